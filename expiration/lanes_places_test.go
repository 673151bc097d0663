package expiration

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// inLanes runs a test under fake time. In the end everything must have been attempted, and nothing be held any more.
func inLanes(t *testing.T, attempt func(l *lanes, r ref, w *turn) (failed bool), test func(l *lanes)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var l *lanes
		l = newLanes(func(r ref, w *turn) bool { return attempt(l, r, w) })
		test(l)
		time.Sleep(time.Hour)
		synctest.Wait()
		l.check(t)
		require.Empty(t, l.rooms)
		require.Equal(t, closers, l.first.free)
		require.Equal(t, retryPlaces, l.again.free)
		require.Empty(t, l.first.senders)
		require.Empty(t, l.again.senders)
		require.Zero(t, l.overtime+l.first.lent+l.again.lent)
		l.stop()
		l.wait()
	})
}

// check requires what must be true of the lanes whenever nobody holds their lock.
func (l *lanes) check(t *testing.T) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range []*class{&l.first, &l.again} {
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
				require.Equal(t, s.hash, q.waiting[0].sender)
			}
		}
		require.Equal(t, lent, c.lent)
		// An early turn that becomes its room's oldest may be of a sender who would have needed a loan: the room has its place already.
		if c == &l.first {
			require.Equal(t, closers, c.free+held)
			require.Equal(t, overtime, l.overtime)
			require.LessOrEqual(t, overtime, maxOvertime)
		} else {
			require.Equal(t, retryPlaces, c.free+held)
			require.Zero(t, overtime)
		}
		require.Nil(t, c.next(), "nobody waits for a place that is free")
	}
	for _, room := range l.rooms {
		waits := len(room.first.waiting)+len(room.again.waiting) > 0
		require.True(t, waits || len(room.turns) > 0, "a room is forgotten")
		require.Equal(t, waits && len(room.turns) == 0, room.first.offered != nil || room.again.offered != nil)
	}
}

// attempts has which timers were attempted when, by the numbers of their rows.
type attempts struct {
	mu    sync.Mutex
	begun map[int64]time.Time
	order []int64
}

func (a *attempts) note(r ref) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.begun == nil {
		a.begun = map[int64]time.Time{}
	}
	a.begun[r.nid] = time.Now()
	a.order = append(a.order, r.nid)
}

// at returns when a timer was attempted last.
func (a *attempts) at(nid int64) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.begun[nid]
}

// sequence returns the timers in the order of the attempts.
func (a *attempts) sequence() []int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.order)
}

// An attempt that hangs gives its place to another room after placePatience, but not the turn of its own.
func TestPlaceIsGivenBack(t *testing.T) {
	const hangs, next, other = 1, 1000, 2000
	var a attempts
	inLanes(t, func(l *lanes, r ref, _ *turn) bool {
		a.note(r)
		if r.nid < next {
			time.Sleep(time.Minute)
		}
		return false
	}, func(l *lanes) {
		start := time.Now()
		for i := range uint64(closers) {
			l.add(waiting{ref{nid: int64(hangs + i)}, i, 1}, i, false)
		}
		l.add(waiting{ref{nid: next}, closers, 2}, 0, false)
		l.add(waiting{ref{nid: other}, closers, 3}, closers, false)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.Equal(t, placePatience, a.at(other).Sub(start))
		require.Equal(t, time.Minute, a.at(next).Sub(start), "the order of the room")
	})
}

// An attempt that could not give its place back, because too many had, does so when some of these have ended.
func TestPlaceIsGivenBackLater(t *testing.T) {
	const other = 1000
	var a attempts
	inLanes(t, func(l *lanes, r ref, _ *turn) bool {
		a.note(r)
		switch {
		case r.nid < maxOvertime:
			time.Sleep(2*placePatience + time.Second)
		case r.nid < other:
			time.Sleep(time.Minute)
		}
		return false
	}, func(l *lanes) {
		start := time.Now()
		for i := range uint64(closers + maxOvertime) {
			l.add(waiting{ref{nid: int64(i)}, i, 1}, i, false)
			time.Sleep(time.Millisecond)
		}
		l.add(waiting{ref{nid: other}, other, 2}, other, false)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.InDelta(t, 3*placePatience, a.at(other).Sub(start), float64(time.Second))
	})
}

// In a room that has overrun no turn begins early: as long as some do, the room would be in progress without a place.
func TestNoEarlyTurnInOvertime(t *testing.T) {
	const overruns, next, others = 1, 2, 1000
	var a attempts
	inLanes(t, func(l *lanes, r ref, w *turn) bool {
		a.note(r)
		if r.nid >= others {
			time.Sleep(time.Minute)
			return false
		}
		time.Sleep(3 * time.Second)
		_ = w.follow(context.Background(), SignedEvent{}, true)
		time.Sleep(time.Second)
		return false
	}, func(l *lanes) {
		l.earlyEvery = 1
		start := time.Now()
		l.add(waiting{ref{nid: overruns}, 1, 0}, 1, false)
		l.add(waiting{ref{nid: next}, 1, 1}, 1, false)
		time.Sleep(time.Second)
		for i := range uint64(2 * closers) {
			l.add(waiting{ref{nid: int64(others + i)}, others + i, 2}, others+i, false)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		require.GreaterOrEqual(t, a.at(next).Sub(start), 4*time.Second, "when the one before is over")
	})
}

// However many attempts hang, no more than maxOvertime go on without a place, and others get one when those end.
func TestOvertimeIsBounded(t *testing.T) {
	var a attempts
	working, most := 0, 0
	const hangs, last = 10 * time.Second, 10 * closers
	inLanes(t, func(l *lanes, r ref, _ *turn) bool {
		a.note(r)
		l.mu.Lock()
		working++
		most = max(most, working)
		l.mu.Unlock()
		time.Sleep(hangs)
		l.mu.Lock()
		working--
		l.mu.Unlock()
		return false
	}, func(l *lanes) {
		start := time.Now()
		for i := range uint64(last + 1) {
			l.add(waiting{ref{nid: int64(i)}, i, time.Duration(i)}, i, false)
		}
		for range 200 {
			time.Sleep(time.Second)
			synctest.Wait()
			l.check(t)
		}
		require.Equal(t, closers+maxOvertime, most)
		require.Less(t, a.at(last).Sub(start), hangs*last/closers)
	})
}

// Ten users have timers in a hundred rooms each, whose attempts hang until they are given up, and are retried for ever. Whatever they have
// done before, a bystander's timers are attempted in time.
func TestHostileSenders(t *testing.T) {
	const (
		senders, rooms, bystander = 10, 100, 1 << 20
		gaveUp                    = 10 * time.Second
		lasts                     = 10 * time.Minute
	)
	var a attempts
	inLanes(t, func(l *lanes, r ref, w *turn) bool {
		a.note(r)
		if r.nid >= bystander {
			time.Sleep(100 * time.Millisecond)
			return false
		}
		time.Sleep(gaveUp)
		return true
	}, func(l *lanes) {
		hostile := func(retry bool) {
			for s := range uint64(senders) {
				for i := range uint64(rooms) {
					room := s*rooms + i
					l.add(waiting{ref{nid: int64(room)}, s, 0}, room, retry)
				}
			}
		}
		hostile(false)
		start := time.Now()
		due := map[int64]time.Time{}
		for n := int64(bystander); time.Since(start) < lasts; n++ {
			l.add(waiting{ref{nid: n}, senders, time.Since(start)}, uint64(n), false)
			due[n] = time.Now()
			if n%200 == 0 {
				hostile(n%400 == 0)
			}
			time.Sleep(500 * time.Millisecond)
			if synctest.Wait(); n%100 == 0 {
				l.check(t)
			}
		}
		for n, at := range due {
			require.Less(t, a.at(n).Sub(at), placePatience, n-bystander)
		}
		l.mu.Lock() // those that are left would take very long
		for _, room := range l.rooms {
			l.withdraw(room)
			room.first.waiting, room.again.waiting = nil, nil
			l.arrange(room)
		}
		l.mu.Unlock()
	})
}

// A mass expiry of one user gets most places when nobody else needs them, and leaves some when somebody does.
func TestSenderShare(t *testing.T) {
	var a attempts
	const rooms = 200
	inLanes(t, func(l *lanes, r ref, _ *turn) bool {
		a.note(r)
		time.Sleep(time.Second)
		return false
	}, func(l *lanes) {
		start := time.Now()
		for i := range uint64(rooms) {
			l.add(waiting{ref{nid: int64(i)}, 1, time.Duration(i)}, i, false)
		}
		synctest.Wait()
		require.Len(t, a.sequence(), maxLoans+senderShare)
		for s := range uint64(10) {
			for i := range uint64(senderShare) {
				l.add(waiting{ref{nid: int64(1000 + senderShare*s + i)}, 2 + s, rooms}, 1000+senderShare*s+i, false)
			}
		}
		synctest.Wait()
		require.Len(t, a.sequence(), maxLoans+11*senderShare, "at once")
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Less(t, a.at(rooms-1).Sub(start), rooms/(maxLoans+senderShare)*time.Second+time.Second)
	})
}

// Retries have places of their own, however many there are, and the senders get them in turns.
func TestRetriesComeLast(t *testing.T) {
	const many, one, first = 1000, 2000, 3000
	var a attempts
	working := 0
	inLanes(t, func(l *lanes, r ref, _ *turn) bool {
		a.note(r)
		if r.nid >= first {
			return false
		}
		l.mu.Lock()
		working++
		require.LessOrEqual(t, working, retryPlaces)
		l.mu.Unlock()
		time.Sleep(10 * time.Second)
		l.mu.Lock()
		working--
		l.mu.Unlock()
		return true
	}, func(l *lanes) {
		start := time.Now()
		for i := range uint64(many) {
			l.add(waiting{ref{nid: int64(i)}, i % retryPlaces, 0}, i, true)
		}
		l.add(waiting{ref{nid: one}, many, 1}, one, true)
		for i := range uint64(closers) {
			l.add(waiting{ref{nid: int64(first + i)}, many + 1 + i, 2}, first+i, false)
		}
		time.Sleep(11 * time.Second)
		synctest.Wait()
		require.Equal(t, 10*time.Second, a.at(one).Sub(start), "one of the others had to end")
		for i := range int64(closers) {
			require.Equal(t, start, a.at(first+i))
		}
	})
}

// In a room retries come after first attempts, but now and then, and both in the order of their deadlines.
func TestRetriesInARoom(t *testing.T) {
	var a attempts
	inLanes(t, func(l *lanes, r ref, _ *turn) bool {
		a.note(r)
		time.Sleep(time.Millisecond)
		return false
	}, func(l *lanes) {
		l.add(waiting{ref{nid: 1}, 1, 100}, 1, false) // in progress
		for i := range int64(3) {
			l.add(waiting{ref{nid: 102 - i}, 1, time.Duration(2 - i)}, 1, true)
		}
		for i := range int64(2 * retryEvery) {
			l.add(waiting{ref{nid: 2 + i}, 2, 101}, 1, false)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		want := []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 10, 11, 12, 13, 14, 15, 16, 17, 101, 102}
		require.Equal(t, want, a.sequence())
	})
}

// When one attempt of a sender has hung and failed, all its timers come last, in the rooms of others too, until it is forgotten. One that
// took as long and did not fail changes nothing.
func TestTimersOfAHungSenderComeLast(t *testing.T) {
	for _, fails := range []bool{true, false} {
		const hangs = 10 * time.Second
		var a attempts
		inLanes(t, func(l *lanes, r ref, _ *turn) bool {
			a.note(r)
			if r.nid < 100 {
				time.Sleep(hangs)
				return fails
			}
			return false
		}, func(l *lanes) {
			start := time.Now()
			for i := range int64(50) { // all in one room, and then one each
				l.add(waiting{ref{nid: i}, 1, time.Duration(i)}, 1, false)
				l.add(waiting{ref{nid: 50 + i}, 1, time.Duration(50 + i)}, 50+uint64(i), false)
			}
			for room := range uint64(100) {
				l.add(waiting{ref{nid: int64(1000 + room)}, 2, time.Hour}, room, false)
			}
			time.Sleep(time.Second)
			l.check(t)
			time.Sleep(hangs)
			synctest.Wait()
			l.check(t)
			for room := range int64(100) {
				if at := a.at(1000 + room); fails {
					require.NotZero(t, at, room)
					require.LessOrEqual(t, at.Sub(start), hangs, room)
				} else if room == 1 {
					require.Zero(t, at, "the order of the room")
				}
			}
			time.Sleep(20 * time.Minute)
			synctest.Wait()
			require.Len(t, slices.Compact(slices.Sorted(slices.Values(a.sequence()))), 200, "all have had an attempt")
			require.Equal(t, fails, l.hung[1] != time.Time{})
			time.Sleep(hungFor)
			require.False(t, l.isHung(1), "for ever")
		})
	}
}

// An attempt that fails sooner says nothing of the sender's other timers.
func TestFailureIsNotAHang(t *testing.T) {
	inLanes(t, func(*lanes, ref, *turn) bool {
		time.Sleep(placePatience - time.Millisecond)
		return true
	}, func(l *lanes) {
		l.add(waiting{ref{nid: 1}, 1, 0}, 1, false)
		time.Sleep(placePatience)
		synctest.Wait()
		require.False(t, l.isHung(1))
	})
}

// A sender whose queue is withdrawn because its room is busy, and offered again, keeps its turn.
func TestTurnOutlivesWithdrawal(t *testing.T) {
	c := newClass(1, retryShare, maxRetryLoans)
	c.inTurns = true
	queueOf := func(sender uint64) *queue { return &queue{waiting: []waiting{{sender: sender}}} }
	first, second := queueOf(1), queueOf(2)
	c.offer(first)
	c.offer(second)
	for range 9 {
		c.withdraw(first)
		c.offer(first)
		require.Same(t, first, c.next())
	}
	c.withdraw(first)
	first.take()
	first.waiting = queueOf(1).waiting
	c.offer(first)
	require.Same(t, second, c.next(), "the next timer has a turn of its own")
}
