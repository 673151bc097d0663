package expiration

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

// Senders whose attempts hang take a bounded share of the places, and others are attempted in time.

// hangs is a hook in which the roomserver never answers for events of users called mallory.
func hangs(e Event) error {
	if strings.HasPrefix(e.Sender, "@mallory") {
		time.Sleep(attemptTimeout)
		return errFault
	}
	return nil
}

// Ten users have timers in many rooms, and none of their attempts is answered. Other users' timers are closed in time. In the ten users'
// own rooms, others wait for one attempt of each of them.
func TestBystanderOfHostileUsers(t *testing.T) {
	const users, rooms, lasts = 10, 50, 10 * time.Minute
	inWorld(t, Config{MaxRunningPerUser: int(lasts / time.Second)}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: hangs})
		for u := range users {
			for i := range rooms {
				e := Event{
					ID: fmt.Sprintf("$%d-%d", u, i), RoomID: fmt.Sprintf("!%d-%d", u, i),
					Type: "m.room.message", Sender: fmt.Sprintf("@mallory%d:example.org", u),
				}
				w.send(e, time.Minute)
				e.ID, e.RoomID = "$one-"+e.ID, fmt.Sprintf("!of %d", u)
				w.send(e, time.Minute)
			}
			w.message(fmt.Sprintf("!of %d", u), 61*time.Second)
		}
		time.Sleep(50 * time.Second)
		n := users
		for ; n < users+int(lasts/(2*time.Second)); n++ {
			w.message(fmt.Sprintf("!bystander%d", n), 10*time.Second)
			time.Sleep(2 * time.Second)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		closings := w.roomserver.closings()
		require.Len(t, closings, n)
		for _, c := range closings {
			late := c.at.Sub(c.sent)
			if strings.HasPrefix(c.roomID, "!bystander") {
				require.Less(t, late, 2*time.Second, c.roomID)
			} else {
				require.LessOrEqual(t, late, 2*attemptTimeout, c.roomID)
			}
		}
	})
}

// The timers of senders whose attempts hung are retried in few rooms at a time.
func TestRetriesAreFew(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		var working, most atomic.Int32
		w.roomserver.set(hooks{beforeClaim: func(Event) error {
			if n := working.Add(1); n > most.Load() {
				most.Store(n)
			}
			defer working.Add(-1)
			time.Sleep(lanes.PlacePatience + time.Second)
			return errFault
		}})
		for i := range lanes.Places {
			w.send(Event{ID: fmt.Sprint("$", i), RoomID: fmt.Sprint("!", i), Type: "m.room.message", Sender: fmt.Sprint("@", i)}, time.Minute)
		}
		time.Sleep(time.Minute + lanes.PlacePatience + time.Second)
		synctest.Wait()
		require.EqualValues(t, lanes.Places, most.Load())
		most.Store(0)
		time.Sleep(time.Minute)
		require.EqualValues(t, lanes.RetryPlaces, most.Load())
	})
}
