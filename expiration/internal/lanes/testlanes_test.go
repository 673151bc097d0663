package lanes

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// testLanes are lanes with numbered jobs, which are all attempted by one function.
type testLanes struct {
	*Lanes
	attempt func(l *testLanes, r int64, w *Turn) (failed bool)
}

func newTestLanes(attempt func(l *testLanes, r int64, w *Turn) (failed bool)) *testLanes {
	return &testLanes{New(EarlyEvery), attempt}
}

// add adds a job.
func (l *testLanes) add(r int64, sender uint64, due time.Duration, room uint64, retry bool) {
	l.Add(Job{Sender: sender, Due: due, Attempt: func(w *Turn) bool { return l.attempt(l, r, w) }}, room, retry)
}

// follow calls Follow for an event that has no known prev event.
func follow(w *Turn, early bool) error {
	return w.Follow(context.Background(), "", isNot, early)
}

func isNot(string) bool { return false }

// inLanes runs a test under fake time. At its end everything must have been attempted, and nothing may be held.
func inLanes(t *testing.T, attempt func(l *testLanes, r int64, w *Turn) (failed bool), test func(l *testLanes)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := newTestLanes(attempt)
		test(l)
		time.Sleep(time.Hour)
		synctest.Wait()
		l.check(t)
		require.Empty(t, l.rooms)
		require.Equal(t, Places, l.first.free)
		require.Equal(t, RetryPlaces, l.retries.free)
		require.Empty(t, l.first.senders)
		require.Empty(t, l.retries.senders)
		require.Zero(t, l.overtime+l.first.lent+l.retries.lent)
		l.Stop()
		l.Wait()
	})
}

// check requires the invariants of the lanes. Lanes.mu must not be held.
func (l *testLanes) check(t *testing.T) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range []*class{&l.first, &l.retries} {
		held, overtime, lent, queues := 0, 0, 0, 0
		for _, room := range l.rooms {
			switch {
			case len(room.turns) == 0 || room.class != c:
			case room.placed:
				held++
			default:
				overtime++
			}
		}
		for _, s := range c.senders {
			lent += max(s.holds-c.share, 0)
			queues += len(s.queues)
			require.Equal(t, len(s.queues) > 0, s.heap != nil)
			for i, q := range s.queues {
				require.Equal(t, i, q.at)
				require.Empty(t, q.lane.turns)
				require.Equal(t, s.hash, q.waiting[0].Sender)
			}
		}
		require.Equal(t, lent, c.lent)
		// An early turn that becomes its room's oldest may put its sender over the share without a loan, because the room has its place
		// already.
		if c == &l.first {
			require.Equal(t, Places, c.free+held)
			require.Equal(t, overtime, l.overtime)
			require.LessOrEqual(t, overtime, maxOvertime)
		} else {
			require.Equal(t, RetryPlaces, c.free+held)
			require.Zero(t, overtime)
		}
		require.Nil(t, c.next(), "no room waits while a place is free")
	}
	for _, room := range l.rooms {
		waits := len(room.first.waiting)+len(room.retries.waiting) > 0
		require.True(t, waits || len(room.turns) > 0, "a room is forgotten")
		require.Equal(t, waits && len(room.turns) == 0, room.first.offered != nil || room.retries.offered != nil)
	}
}

// attempts records when each timer was attempted, by number.
type attempts struct {
	mu    sync.Mutex
	begun map[int64]time.Time
	order []int64
}

func (a *attempts) note(r int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.begun == nil {
		a.begun = map[int64]time.Time{}
	}
	a.begun[r] = time.Now()
	a.order = append(a.order, r)
}

// at returns when a timer was last attempted.
func (a *attempts) at(nid int64) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.begun[nid]
}

// sequence returns the timers in the order of their attempts.
func (a *attempts) sequence() []int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.order)
}
