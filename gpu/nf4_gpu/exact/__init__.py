"""The exact tier of arithmetic on the device: the rooms of nf4.exact, to the same bits (NF4-14, NF4-15)."""
