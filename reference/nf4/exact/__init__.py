"""The exact tier of arithmetic (NF4-14): products, sums and functions whose bits no machine can change."""
