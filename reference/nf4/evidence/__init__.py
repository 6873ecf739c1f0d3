"""What NF4 promises, measured: grids compared, memory planned, pictures, a page to try it on."""
