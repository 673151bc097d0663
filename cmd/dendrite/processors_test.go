package main

import (
	"runtime"
	"testing"

	"github.com/matrix-org/dendrite/setup/config"
)

func TestAddProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	for _, c := range []struct {
		name, database, set string
		more                int
	}{
		{"SQLite", "file:roomserver.db", "", spareProcessors},
		{"SQLite, and the operator has said how many", "file:roomserver.db", "1", 0},
		{"PostgreSQL", "postgresql://localhost/dendrite", "", 0},
		{"PostgreSQL for all components", "", "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer runtime.GOMAXPROCS(before)
			t.Setenv("GOMAXPROCS", c.set)
			cfg := &config.Dendrite{}
			cfg.RoomServer.Database.ConnectionString = config.DataSource(c.database)
			addProcessors(cfg)
			if got := runtime.GOMAXPROCS(0); got != before+c.more {
				t.Errorf("%d processors, want %d", got, before+c.more)
			}
		})
	}
}
