package main

import (
	"os"
	"runtime"

	"github.com/matrix-org/dendrite/setup/config"
)

// spareProcessors is how many threads more than there are cores may run Go code.
const spareProcessors = 2

// addProcessors lets the cores work while SQLite waits for the disk. Who waits for it in a system call keeps one of Go's processors,
// of which there are as many as cores, until Go notices; that takes longer than most syncs. With two cores and two databases that are
// written at the same time nothing else would run. PostgreSQL is waited for in no system call, and more processors only take the cores
// from it. See docs/performance.md, "Processors". An operator's own GOMAXPROCS is left alone.
func addProcessors(cfg *config.Dendrite) {
	if cfg.RoomServer.Database.ConnectionString.IsSQLite() && os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + spareProcessors)
	}
}
