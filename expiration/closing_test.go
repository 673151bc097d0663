package expiration

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A due timer is attempted again if a send holds the lock of its state for longer than an attempt waits.
func TestAttemptsWaitForASend(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		delayID := w.schedule(leave("other"), "left", 10*time.Second)
		s, _ := e.State()
		unlock, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		s.Key = "other"
		unlockOther, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		time.Sleep(10*time.Second + 3*attemptTimeout)
		require.NoError(t, w.invariants())
		require.Nil(t, w.final(delayID))
		unlock()
		unlockOther()
		time.Sleep(lastPause + time.Second)
		w.wantClosings(e)
		w.wantSent("left")
	})
}
