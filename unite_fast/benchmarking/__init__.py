"""How fast a recipe trains on this machine (`unite-fast bench`), and what makes it faster (`unite-fast tune`)."""
