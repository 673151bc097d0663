package lanes

import (
	"context"
	"fmt"
	"math/rand/v2"
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
