package lanes

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// An attempt that hangs gives its place to another room after PlacePatience, but its own room still waits.
func TestPlaceIsGivenBack(t *testing.T) {
	const hangs, next, other = 1, 1000, 2000
	var a attempts
	inLanes(t, func(l *testLanes, r int64, _ *Turn) bool {
		a.note(r)
		if r < next {
			time.Sleep(time.Minute)
		}
		return false
	}, func(l *testLanes) {
		start := time.Now()
		for i := range uint64(Places) {
			l.add(int64(hangs+i), i, 1, i, false)
		}
		l.add(next, Places, 2, 0, false)
		l.add(other, Places, 3, Places, false)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.Equal(t, PlacePatience, a.at(other).Sub(start))
		require.Equal(t, time.Minute, a.at(next).Sub(start), "the order of the room")
	})
}

// An attempt that could not give up its place, because maxOvertime was reached, does so when others end.
func TestPlaceIsGivenBackLater(t *testing.T) {
	const other = 1000
	var a attempts
	inLanes(t, func(l *testLanes, r int64, _ *Turn) bool {
		a.note(r)
		switch {
		case r < maxOvertime:
			time.Sleep(2*PlacePatience + time.Second)
		case r < other:
			time.Sleep(time.Minute)
		}
		return false
	}, func(l *testLanes) {
		start := time.Now()
		for i := range uint64(Places + maxOvertime) {
			l.add(int64(i), i, 1, i, false)
			time.Sleep(time.Millisecond)
		}
		l.add(other, other, 2, other, false)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.InDelta(t, 3*PlacePatience, a.at(other).Sub(start), float64(time.Second))
	})
}

// In a room that has overrun no turn is early. Otherwise the room could stay in progress without a place as long as early turns follow.
func TestNoEarlyTurnInOvertime(t *testing.T) {
	const overruns, next, others = 1, 2, 1000
	var a attempts
	inLanes(t, func(l *testLanes, r int64, w *Turn) bool {
		a.note(r)
		if r >= others {
			time.Sleep(time.Minute)
			return false
		}
		time.Sleep(3 * time.Second)
		_ = follow(w, true)
		time.Sleep(time.Second)
		return false
	}, func(l *testLanes) {
		l.earlyEvery = 1
		start := time.Now()
		l.add(overruns, 1, 0, 1, false)
		l.add(next, 1, 1, 1, false)
		time.Sleep(time.Second)
		for i := range uint64(2 * Places) {
			l.add(int64(others+i), others+i, 2, others+i, false)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		require.GreaterOrEqual(t, a.at(next).Sub(start), 4*time.Second, "when the previous turn is over")
	})
}

// However many attempts hang, at most maxOvertime go on without a place. When those end, others get a place.
func TestOvertimeIsBounded(t *testing.T) {
	var a attempts
	working, most := 0, 0
	const hangs, last = 10 * time.Second, 10 * Places
	inLanes(t, func(l *testLanes, r int64, _ *Turn) bool {
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
	}, func(l *testLanes) {
		start := time.Now()
		for i := range uint64(last + 1) {
			l.add(int64(i), i, time.Duration(i), i, false)
		}
		for range 200 {
			time.Sleep(time.Second)
			synctest.Wait()
			l.check(t)
		}
		require.Equal(t, Places+maxOvertime, most)
		require.Less(t, a.at(last).Sub(start), hangs*last/Places)
	})
}

// Ten users have timers in a hundred rooms each, whose attempts hang until they time out, and are retried forever. Whatever they have done
// before, a bystander's timers are attempted in time.
func TestHostileSenders(t *testing.T) {
	const (
		senders, rooms, bystander = 10, 100, 1 << 20
		gaveUp                    = 10 * time.Second
		lasts                     = 10 * time.Minute
	)
	var a attempts
	inLanes(t, func(l *testLanes, r int64, w *Turn) bool {
		a.note(r)
		if r >= bystander {
			time.Sleep(100 * time.Millisecond)
			return false
		}
		time.Sleep(gaveUp)
		return true
	}, func(l *testLanes) {
		hostile := func(retry bool) {
			for s := range uint64(senders) {
				for i := range uint64(rooms) {
					room := s*rooms + i
					l.add(int64(room), s, 0, room, retry)
				}
			}
		}
		hostile(false)
		start := time.Now()
		due := map[int64]time.Time{}
		for n := int64(bystander); time.Since(start) < lasts; n++ {
			l.add(n, senders, time.Since(start), uint64(n), false)
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
			require.Less(t, a.at(n).Sub(at), PlacePatience, n-bystander)
		}
		l.mu.Lock() // attempting the remaining timers would take very long
		for _, room := range l.rooms {
			l.withdraw(room)
			room.first.waiting, room.retries.waiting = nil, nil
			l.arrange(room)
		}
		l.mu.Unlock()
	})
}

// One user's mass expiry gets most places while no other sender needs them, and leaves some when others do.
func TestSenderShare(t *testing.T) {
	var a attempts
	const rooms = 200
	inLanes(t, func(l *testLanes, r int64, _ *Turn) bool {
		a.note(r)
		time.Sleep(time.Second)
		return false
	}, func(l *testLanes) {
		start := time.Now()
		for i := range uint64(rooms) {
			l.add(int64(i), 1, time.Duration(i), i, false)
		}
		synctest.Wait()
		require.Len(t, a.sequence(), maxLoans+senderShare)
		for s := range uint64(10) {
			for i := range uint64(senderShare) {
				l.add(int64(1000+senderShare*s+i), 2+s, rooms, 1000+senderShare*s+i, false)
			}
		}
		synctest.Wait()
		require.Len(t, a.sequence(), maxLoans+11*senderShare, "at once")
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Less(t, a.at(rooms-1).Sub(start), rooms/(maxLoans+senderShare)*time.Second+time.Second)
	})
}

// Retries have places of their own, however many retries there are, and senders get them in turns.
func TestRetriesComeLast(t *testing.T) {
	const many, one, first = 1000, 2000, 3000
	var a attempts
	working := 0
	inLanes(t, func(l *testLanes, r int64, _ *Turn) bool {
		a.note(r)
		if r >= first {
			return false
		}
		l.mu.Lock()
		working++
		require.LessOrEqual(t, working, RetryPlaces)
		l.mu.Unlock()
		time.Sleep(10 * time.Second)
		l.mu.Lock()
		working--
		l.mu.Unlock()
		return true
	}, func(l *testLanes) {
		start := time.Now()
		for i := range uint64(many) {
			l.add(int64(i), i%RetryPlaces, 0, i, true)
		}
		l.add(one, many, 1, one, true)
		for i := range uint64(Places) {
			l.add(int64(first+i), many+1+i, 2, first+i, false)
		}
		time.Sleep(11 * time.Second)
		synctest.Wait()
		require.Equal(t, 10*time.Second, a.at(one).Sub(start), "a place was given back")
		for i := range int64(Places) {
			require.Equal(t, start, a.at(first+i))
		}
	})
}

// A sender whose queue is withdrawn because its room is busy, and offered again, keeps its ticket.
func TestTurnOutlivesWithdrawal(t *testing.T) {
	c := newClass(1, retryShare, maxRetryLoans)
	c.byTicket = true
	queueOf := func(sender uint64) *queue { return &queue{waiting: []Job{{Sender: sender}}} }
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
