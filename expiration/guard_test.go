package expiration

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Panics in the goroutines of the engine.

// The scheduler, the pruning and the deletions go on after a panic in any of them.
func TestGoesOnAfterPanics(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		w.store.set(false, panicking("prune", "read", "delete", "drop"))
		time.Sleep(pruneInterval)
		w.store.set(false, nil)
		time.Sleep(lastPause)
		other := w.message("!room", 10*time.Second)
		time.Sleep(time.Minute)
		w.wantClosings(e, other)
		w.wantNoRows()
		time.Sleep(pruneInterval)
		require.NotZero(t, w.store.pruned())
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) { // the panic is in the scheduler
		w.mu.Lock()
		intact := w.index
		w.index = nil
		w.mu.Unlock()
		w.notify()
		synctest.Wait()
		w.mu.Lock()
		w.index = intact
		w.mu.Unlock()
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second + time.Second)
		w.wantClosings(e)
	})
}

// panicking makes some operations of the store panic.
func panicking(operations ...string) func(string) error {
	fail := failing(operations...)
	return func(operation string) error {
		if fail(operation) != nil {
			panic("on purpose: " + operation)
		}
		return nil
	}
}
