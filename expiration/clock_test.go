package expiration

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestStoredTimesAreRoundedUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, now := newClock(), time.Now() // synctest starts at a whole millisecond
		require.Zero(t, c.now())
		require.Equal(t, now.UnixNano(), c.stored(0).UnixNano())
		require.Equal(t, now.Add(time.Millisecond).UnixNano(), c.stored(time.Nanosecond).UnixNano())
		require.Equal(t, now.Add(time.Millisecond).UnixNano(), c.stored(time.Millisecond).UnixNano())
		require.Equal(t, time.Second, c.moment(c.stored(time.Second)))
	})
}

// steps are distances by which an administrator or NTP may set the wall clock.
var steps = []time.Duration{-1000 * time.Hour, -time.Hour, -3 * time.Second, 3 * time.Second, time.Hour, 1000 * time.Hour}

// While the process lives, steps of the wall clock change nothing: no timer fires early or late.
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

// Across a restart only the wall clock counts. No timer fires early by it, and none is later than the clock was set back.
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

// No timer is dropped when a clock that was wrong by years, as on a machine without a battery, is corrected.
func TestWallClockIsSetRight(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		queued := Event{ID: "$queued", RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
		_, err := w.Begin(t.Context(), queued, time.Second, false)
		require.NoError(t, err)
		w.restart(time.Second)
		w.step.Store(int64(30 * 365 * 24 * time.Hour))
		w.restart(time.Second)
		time.Sleep(10 * time.Minute) // the roomserver does not know the event yet
		w.roomserver.send(queued)
		time.Sleep(time.Minute)
		w.wantClosings(queued)
	})
}
