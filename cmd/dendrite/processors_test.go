package main

import (
	"runtime"
	"testing"
)

func TestAddProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	t.Setenv("GOMAXPROCS", "1")
	if addProcessors(); runtime.GOMAXPROCS(0) != before {
		t.Errorf("with GOMAXPROCS set: %d processors, want %d", runtime.GOMAXPROCS(0), before)
	}
	t.Setenv("GOMAXPROCS", "")
	if addProcessors(); runtime.GOMAXPROCS(0) != before+spareProcessors {
		t.Errorf("%d processors, want %d", runtime.GOMAXPROCS(0), before+spareProcessors)
	}
}
