"""SymPy derivations of the library's closed forms, and the code that they emit."""
