package expiration

import (
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// clock joins the two clocks that there are. Moments are compared by the monotonic one, which does not step; time.Time
// carries it. What is stored, or sent to others, is the wall clock's.
type clock struct {
	wall func() time.Time
}

func newClock() clock {
	return clock{wall: failpoint.WallClock}
}

// stored returns a moment as the database keeps it: in whole milliseconds, rounded up, so that nothing is ever early.
func (c clock) stored(moment time.Time) time.Time {
	now := time.Now()
	t := c.wall().Add(moment.Sub(now)).UTC()
	if whole := t.Truncate(time.Millisecond); !whole.Equal(t) {
		return whole.Add(time.Millisecond)
	}
	return t
}

// moment returns when a stored time comes, if the wall clock does not step until then.
func (c clock) moment(stored time.Time) time.Time {
	wall := c.wall()
	return time.Now().Add(stored.Sub(wall))
}
