"""How anything is compared: processes, clocks, memory, parity, records. Knows no library and no workload."""
