"""The control side: drivers, safety gate, clocks and the one control loop; numpy only, so that it starts anywhere."""
