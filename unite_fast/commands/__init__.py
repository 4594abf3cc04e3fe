"""The commands of `unite-fast`, grouped by subject: they parse options and call the rest of the package."""
