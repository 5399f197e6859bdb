"""dsv4 as a worker of fleets that others run. What imports such a fleet's own package is imported only where it is asked for."""
