"""training of the ProGiDiff engine."""
