package expiration

import (
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// clock joins the two clocks that there are. Moments are compared by the monotonic one, which does not step: they are the
// time since the start. What is stored, or sent to others, is the wall clock's.
type clock struct {
	start time.Time
	wall  func() time.Time
}

func newClock() clock {
	return clock{start: time.Now(), wall: failpoint.WallClock}
}

// now returns the present moment.
func (c clock) now() time.Duration { return time.Since(c.start) }

// stored returns a moment as the database keeps it: in whole milliseconds, rounded up, so that nothing is ever early.
func (c clock) stored(moment time.Duration) time.Time {
	now := c.now()
	t := c.wall().Add(moment - now).UTC()
	if whole := t.Truncate(time.Millisecond); !whole.Equal(t) {
		return whole.Add(time.Millisecond)
	}
	return t
}

// moment returns when a stored time comes, if the wall clock does not step until then.
func (c clock) moment(stored time.Time) time.Duration {
	wall := c.wall()
	return c.now() + stored.Sub(wall)
}
