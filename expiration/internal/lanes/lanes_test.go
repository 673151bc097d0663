package lanes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Turns of random length, early or not, with or without forks: all timers are attempted, in the order of each room, and no more rooms are
// in progress than allowed.
func TestLanes(t *testing.T) {
	const (
		atOnce = 3
		rooms  = 10
		timers = 40 // per room
	)
	for seed := range uint64(50) {
		random := rand.New(rand.NewPCG(seed, 0))
		takes := map[int64][2]time.Duration{} // before and after Follow
		upon := map[int64]string{}            // the room's previous event, or an earlier one
		room := func(r int64) uint64 { return uint64(r) % rooms }
		for i := range rooms * timers {
			r := int64(i)
			takes[r] = [2]time.Duration{time.Duration(random.IntN(3)), time.Duration(random.IntN(3))}
			upon[r] = fmt.Sprint(i - rooms*(1+random.IntN(2)))
		}
		began, working, served := map[uint64]int64{}, map[uint64]int{}, 0
		inLanes(t, func(l *testLanes, r int64, w *Turn) bool {
			l.mu.Lock()
			served++
			working[room(r)]++
			assert.LessOrEqual(t, working[room(r)], turnsPerRoom)
			assert.LessOrEqual(t, len(working), atOnce, "rooms at the same time")
			assert.Equal(t, began[room(r)]*rooms+int64(room(r)), r, "the order")
			began[room(r)]++
			l.mu.Unlock()
			time.Sleep(takes[r][0])
			assert.NoError(t, w.Follow(context.Background(), fmt.Sprint(r), func(eventID string) bool { return eventID == upon[r] }, true))
			time.Sleep(takes[r][1])
			l.mu.Lock()
			if working[room(r)]--; working[room(r)] == 0 {
				delete(working, room(r))
			}
			l.mu.Unlock()
			return false
		}, func(l *testLanes) {
			l.first.free = atOnce
			for i := range rooms * timers {
				r := int64(i)
				l.add(r, room(r), time.Duration(i), room(r), false)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			require.Equal(t, rooms*timers, served)
			l.mu.Lock()
			l.first.free += Places - atOnce
			l.mu.Unlock()
		})
	}
}

// A timer that is due before the others of its room moves the room forward.
func TestEarlierTimerMovesItsRoomUp(t *testing.T) {
	const rooms = 3
	for _, senders := range []uint64{1, rooms} {
		l := newTestLanes(nil)
		l.first.free = 0
		for room := range uint64(rooms) {
			l.add(0, room%senders, 10+time.Duration(room), room, false)
		}
		l.add(0, (rooms-1)%senders, 1, rooms-1, false)
		l.first.free = rooms
		for _, want := range []uint64{rooms - 1, 0, 1} {
			next := l.first.next()
			require.Equal(t, want, next.lane.room, senders)
			l.withdraw(next.lane)
		}
	}
}

// In a room most retries come after the first attempts. Both are in the order of their deadlines.
func TestRetriesInARoom(t *testing.T) {
	var a attempts
	inLanes(t, func(l *testLanes, r int64, _ *Turn) bool {
		a.note(r)
		time.Sleep(time.Millisecond)
		return false
	}, func(l *testLanes) {
		l.add(1, 1, 100, 1, false) // in progress
		for i := range int64(3) {
			l.add(102-i, 1, time.Duration(2-i), 1, true)
		}
		for i := range int64(2 * retryEvery) {
			l.add(2+i, 2, 101, 1, false)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		want := []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 10, 11, 12, 13, 14, 15, 16, 17, 101, 102}
		require.Equal(t, want, a.sequence())
	})
}

// After one attempt of a sender has hung and failed, all the sender's timers come last, also in other users' rooms, until hungFor has
// passed. An attempt that took as long and succeeded changes nothing.
func TestTimersOfAHungSenderComeLast(t *testing.T) {
	for _, fails := range []bool{true, false} {
		const hangs = 10 * time.Second
		var a attempts
		inLanes(t, func(l *testLanes, r int64, _ *Turn) bool {
			a.note(r)
			if r < 100 {
				time.Sleep(hangs)
				return fails
			}
			return false
		}, func(l *testLanes) {
			start := time.Now()
			for i := range int64(50) { // first all in one room, then one room each
				l.add(i, 1, time.Duration(i), 1, false)
				l.add(50+i, 1, time.Duration(50+i), 50+uint64(i), false)
			}
			for room := range uint64(100) {
				l.add(int64(1000+room), 2, time.Hour, room, false)
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
			require.Len(t, slices.Compact(slices.Sorted(slices.Values(a.sequence()))), 200, "all timers were attempted")
			require.Equal(t, fails, l.hung[1] != time.Time{})
			time.Sleep(hungFor)
			require.False(t, l.isHung(1), "the sender stays hung")
		})
	}
}

// An attempt that fails sooner has no effect on the sender's other timers.
func TestFailureIsNotAHang(t *testing.T) {
	inLanes(t, func(*testLanes, int64, *Turn) bool {
		time.Sleep(PlacePatience - time.Millisecond)
		return true
	}, func(l *testLanes) {
		l.add(1, 1, 0, 1, false)
		time.Sleep(PlacePatience)
		synctest.Wait()
		require.False(t, l.isHung(1))
	})
}
