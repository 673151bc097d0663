package main

import (
	"os"
	"runtime"

	"github.com/matrix-org/dendrite/setup/config"
)

// spareProcessors is how many more threads than cores may run Go code.
const spareProcessors = 2

// addProcessors keeps the cores busy while SQLite waits for the disk. Go has as many processors as there are cores. A goroutine that waits
// in a system call keeps its processor until Go notices, which takes longer than most syncs. With two cores, and two databases being
// written at the same time, no other goroutine would run. Waiting for PostgreSQL needs no system call, and more processors would only take
// CPU time from it. See docs/performance.md, "Processors". The operator's own GOMAXPROCS is respected.
func addProcessors(cfg *config.Dendrite) {
	if cfg.RoomServer.Database.ConnectionString.IsSQLite() && os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + spareProcessors)
	}
}
