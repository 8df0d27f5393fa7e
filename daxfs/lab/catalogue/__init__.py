"""The scenarios, by what they are about. `S` numbers are those of the catalogue that the issues speak of; the threads are in docs."""
