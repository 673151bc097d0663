package lanes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A panic or runtime.Goexit in an attempt ends only its turn, before or after the event is built, and also in an early turn.
func TestPanicEndsOnlyTheTurn(t *testing.T) {
	const rooms, timers = Places + 10, 6
	for _, exit := range []func(){func() { panic("on purpose") }, runtime.Goexit} {
		for _, early := range []bool{false, true} {
			var a attempts
			inLanes(t, func(l *testLanes, r int64, w *Turn) bool {
				a.note(r)
				if r%2 == 0 {
					exit()
				}
				_ = w.Follow(context.Background(), fmt.Sprint(r), isNot, early)
				if r%3 == 0 {
					exit()
				}
				return false
			}, func(l *testLanes) {
				l.earlyEvery = 1
				for i := range uint64(rooms * timers) {
					l.add(int64(i), i, time.Duration(i), i%rooms, false)
				}
				synctest.Wait()
				require.Len(t, a.sequence(), rooms*timers)
			})
		}
	}
}

// An attempt that panics while it waits for the previous turn must not unlock a lock that it does not hold.
func TestPanicInFollow(t *testing.T) {
	var a attempts
	inLanes(t, func(l *testLanes, r int64, w *Turn) bool {
		a.note(r)
		w.room = nil // makes Follow panic
		defer func() { w.room = l.rooms[1] }()
		return follow(w, true) != nil
	}, func(l *testLanes) {
		for i := range int64(3) {
			l.add(i, 1, 0, 1, false)
		}
		synctest.Wait()
		require.Equal(t, []int64{0, 1, 2}, a.sequence())
	})
}

// After Stop has returned no turn begins. Wait waits for the turns that have begun.
func TestLanesStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a attempts
		l := newTestLanes(func(_ *testLanes, r int64, w *Turn) bool {
			a.note(r)
			time.Sleep(5 * time.Second)
			_ = follow(w, true)
			return true
		})
		for i := range uint64(1000) {
			l.add(int64(i), i, 0, i/2, i%5 == 0)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		l.Stop()
		begun := len(a.sequence())
		l.add(5000, 5000, 0, 5000, false)
		start := time.Now()
		l.Wait()
		require.Equal(t, 4*time.Second, time.Since(start))
		require.Len(t, a.sequence(), begun)
		require.Positive(t, begun)
	})
}

// Whatever the attempts do, all timers are attempted, failed ones again, and the invariants of the lanes hold at every moment.
func TestAnythingInLanes(t *testing.T) {
	const timers, senders, rooms = 600, 8, 90
	for seed := range uint64(6) {
		random := rand.New(rand.NewPCG(seed, 1))
		left := timers
		add := func(l *testLanes, r int64, retry bool) {
			n := uint64(r)
			l.add(r, n*n%senders, time.Duration(n), n%rooms, retry)
		}
		inLanes(t, func(l *testLanes, r int64, w *Turn) (failed bool) {
			l.mu.Lock()
			what, long := random.IntN(8), time.Duration(random.IntN(4000))*time.Millisecond
			l.mu.Unlock()
			time.Sleep(long)
			if what == 0 {
				time.AfterFunc(time.Second, func() { add(l, r, true) })
				panic("on purpose")
			}
			_ = follow(w, what > 4)
			time.Sleep(long)
			if what == 1 {
				time.AfterFunc(time.Second, func() { add(l, r, true) })
				return true
			}
			l.mu.Lock()
			left--
			l.mu.Unlock()
			return false
		}, func(l *testLanes) {
			for i := range int64(timers) {
				add(l, i, false)
				if i%10 == 0 {
					time.Sleep(100 * time.Millisecond)
					synctest.Wait()
					l.check(t)
				}
			}
			for waits := true; waits; {
				time.Sleep(time.Second)
				synctest.Wait()
				l.check(t)
				l.mu.Lock()
				waits = left > 0
				l.mu.Unlock()
			}
		})
	}
}
