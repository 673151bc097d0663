package expiration

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRefreshHolds(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		for range 20 {
			time.Sleep(9 * time.Second)
			require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		}
		w.wantClosings()
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantClosings()
		time.Sleep(time.Nanosecond)
		w.wantClosings(e)
	})
}

func TestFailedRefreshPromisesNothing(t *testing.T) {
	for _, written := range []bool{false, true} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			e := w.message("!room", 10*time.Second)
			time.Sleep(5 * time.Second)
			w.store.set(written, func(string) error { return errFault })
			require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), errFault)
			w.store.set(false, nil)
			time.Sleep(11 * time.Second)
			w.wantClosings(e)
		})
	}
}

func TestRepeatedContent(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", time.Hour)
		require.True(t, w.Running(e.ID, e.Sender))
		require.False(t, w.Running(e.ID, "@bob:example.org"))
		require.NoError(t, w.Restart(t.Context(), e.ID, 10*time.Second), "before the scheduled wake")
		time.Sleep(9 * time.Second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)), "with the new duration")
		time.Sleep(9 * time.Second)
		w.wantClosings()
		time.Sleep(time.Second)
		w.wantClosings(e)
		require.ErrorIs(t, w.Restart(t.Context(), e.ID, time.Second), ErrNotFound)
		require.False(t, w.Running(e.ID, e.Sender))
	})
}

// Each token and delay ID may be used as often as the limit says, whatever happens to other ones.
func TestTokensAreLimited(t *testing.T) {
	const interval = 15 * time.Minute
	inWorld(t, Config{TokenLimit: RateLimit{Threshold: 4, Cooloff: time.Hour}}, func(t *testing.T, w *world) {
		limited := func(allow func() (bool, time.Duration)) {
			t.Helper()
			for i := range 6 {
				known, wait := allow()
				require.True(t, known)
				require.Equal(t, i >= 4, wait == interval, "request %d: %s", i, wait)
				require.Equal(t, i < 4, wait == 0, "request %d: %s", i, wait)
			}
		}
		ofToken := func(e Event) func() (bool, time.Duration) {
			return func() (bool, time.Duration) { return w.Allow(w.hash(e)) }
		}
		first, other := w.message("!a", 2*time.Hour), w.message("!a", 2*time.Hour)
		limited(ofToken(first))
		limited(ofToken(other))
		delayID := w.schedule(leave("key"), "left", 2*time.Hour)
		limited(func() (bool, time.Duration) { return w.AllowDelayed(delayID) })
		time.Sleep(interval)
		_, wait := w.Allow(w.hash(first))
		require.Zero(t, wait)
		_, wait = w.Allow(w.hash(first))
		require.Equal(t, interval, wait)
		require.NoError(t, w.End(t.Context(), w.hash(first)))
		known, wait := w.Allow(w.hash(first))
		require.False(t, known)
		require.Zero(t, wait, "unknown tokens are limited by address")
		time.Sleep(2 * sweepPause) // its row is deleted
		limited(ofToken(w.message("!a", time.Hour)))
		w.restart(time.Second)
		limited(ofToken(other))
	})
}
