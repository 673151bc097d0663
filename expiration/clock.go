package expiration

import (
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// clock combines the monotonic clock and the wall clock. Moments are durations since the start of the process, and are compared by the
// monotonic clock, which never steps. Times that are stored or sent to others are wall-clock times.
type clock struct {
	start time.Time
	wall  func() time.Time
}

func newClock() clock {
	return clock{start: time.Now(), wall: failpoint.WallClock}
}

// now returns the present moment.
func (c clock) now() time.Duration { return time.Since(c.start) }

// stored returns a moment as the database keeps it: in whole milliseconds, rounded up, so that a deadline never passes early.
func (c clock) stored(moment time.Duration) time.Time {
	now := c.now()
	t := c.wall().Add(moment - now).UTC()
	if whole := t.Truncate(time.Millisecond); !whole.Equal(t) {
		return whole.Add(time.Millisecond)
	}
	return t
}

// moment returns the moment of a stored time, assuming that the wall clock does not step until then.
func (c clock) moment(stored time.Time) time.Duration {
	wall := c.wall()
	return c.now() + stored.Sub(wall)
}
