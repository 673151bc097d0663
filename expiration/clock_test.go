package expiration

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestStoredTimesAreRoundedUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, now := newClock(), time.Now() // whole milliseconds here
		require.Zero(t, c.now())
		require.Equal(t, now.UnixNano(), c.stored(0).UnixNano())
		require.Equal(t, now.Add(time.Millisecond).UnixNano(), c.stored(time.Nanosecond).UnixNano())
		require.Equal(t, now.Add(time.Millisecond).UnixNano(), c.stored(time.Millisecond).UnixNano())
		require.Equal(t, time.Second, c.moment(c.stored(time.Second)))
	})
}

// steps are how far an administrator, or NTP, sets the wall clock.
var steps = []time.Duration{-1000 * time.Hour, -time.Hour, -3 * time.Second, 3 * time.Second, time.Hour, 1000 * time.Hour}

// While the process lives, the wall clock can step as it likes: nothing fires early, nothing late.
func TestWallClockSteps(t *testing.T) {
	for _, step := range steps {
		t.Run(step.String(), func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				before, held := w.message("!room", 10*time.Second), w.message("!room", 10*time.Second)
				time.Sleep(5 * time.Second)
				w.step.Store(int64(step))
				require.NoError(t, w.Refresh(t.Context(), w.hash(held)))
				after := w.message("!room", 20*time.Second)
				time.Sleep(5*time.Second - time.Nanosecond)
				w.wantClosings()
				time.Sleep(time.Nanosecond)
				w.wantClosings(before)
				time.Sleep(5 * time.Second)
				w.wantClosings(before, held)
				time.Sleep(10 * time.Second)
				w.wantClosings(before, held, after)
				require.Equal(t, time.Now().Add(step).UnixMilli(), w.roomserver.closings()[2].sent.UnixMilli())
			})
		})
	}
}

// Across a restart only the wall clock counts. By it nothing is early, and nothing hangs for longer than it was set back.
func TestWallClockStepsWhileTheServerIsDown(t *testing.T) {
	for _, step := range steps {
		t.Run(step.String(), func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				e := w.message("!room", 10*time.Second)
				w.restart(0)
				w.step.Store(int64(step))
				w.restart(4 * time.Second)
				remaining := max(6*time.Second-step, 0)
				if remaining > 0 {
					time.Sleep(remaining - time.Nanosecond)
					w.wantClosings()
					time.Sleep(time.Nanosecond)
				}
				w.wantClosings(e)
			})
		})
	}
}

// A server whose clock was wrong for years, as that of a machine without a battery is, drops no timer when it is set right.
func TestWallClockIsSetRight(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		queued := Event{ID: "$queued", RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
		_, err := w.Begin(t.Context(), queued, time.Second, false)
		require.NoError(t, err)
		w.restart(time.Second)
		w.step.Store(int64(30 * 365 * 24 * time.Hour))
		w.restart(time.Second)
		time.Sleep(10 * time.Minute) // the roomserver does not know it yet
		w.roomserver.send(queued)
		time.Sleep(time.Minute)
		w.wantClosings(queued)
	})
}
