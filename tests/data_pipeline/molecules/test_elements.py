from unite_fast.data_pipeline.molecules.elements import NUMBERS, SYMBOLS


def test_symbols_and_numbers_are_inverse():
    assert len(SYMBOLS) == 119 and SYMBOLS[0] == "" and len(NUMBERS) == 118
    assert all(NUMBERS[symbol] == number for number, symbol in enumerate(SYMBOLS) if number)


def test_some_elements():
    assert {symbol: NUMBERS[symbol] for symbol in ("H", "C", "N", "O", "F", "Cl", "Xe", "Au", "Og")} == {
        **{"H": 1, "C": 6, "N": 7, "O": 8, "F": 9, "Cl": 17},
        **{"Xe": 54, "Au": 79, "Og": 118},
    }
