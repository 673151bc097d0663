//go:build all

package hostile

import (
	"context"
	"testing"
	"time"
)

// testSeeds replays the kept inputs one by one. If an input ends the process, a new server gets the rest.
func testSeeds(t *testing.T, db database) {
	inputs := kept(t)
	for len(inputs) > 0 {
		inputs = inputs[replay(t, db, inputs):]
	}
}

// replay replays inputs on a server of their own until the process ends. It returns the number of replayed inputs.
func replay(t *testing.T, db database, inputs []*input) int {
	t.Helper()
	s := start(t, db, unlimited)
	f := newFuzzer(s, s.register(t, "hostile", 2))
	b := newBystander(t, s)
	defer f.found.report(t)
	defer f.searchLog(t)
	for i, in := range inputs {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		f.run(ctx, in, 0)
		if ctx.Err() != nil {
			f.found.add("neither done nor scheduled", in, "after %s", patience)
		}
		cancel()
		if is := b.phase(); is.max > s.lateness() {
			f.found.add("the bystander's events are late", in, "%s", is.max)
		}
		if f.died.Load() || !s.alive() {
			f.found.add("the process ended", in, "")
			return i + 1
		}
	}
	time.Sleep(lateness)
	f.bystander(b, "after all seeds")
	f.awaitQuiet(t)
	return len(inputs)
}
