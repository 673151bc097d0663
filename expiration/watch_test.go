package expiration

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

func TestExpiresAtTheDeadline(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantClosings()
		time.Sleep(time.Nanosecond)
		w.wantClosings(e)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
		w.wantNoRows()
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.closings.WithLabelValues("expired")))
	})
}

// A slow room delays no other room.
func TestRoomsDoNotWaitForOneAnother(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: func(e Event) error {
			if e.RoomID == "!slow" {
				time.Sleep(8 * time.Second)
			}
			return nil
		}})
		var slow, fast []Event
		for i := range 5 {
			slow = append(slow, w.message("!slow", 10*time.Second-time.Duration(5-i)*time.Millisecond))
			fast = append(fast, w.message(fmt.Sprintf("!fast%d", i), 10*time.Second))
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		require.Len(t, w.roomserver.closings(), len(fast))
		time.Sleep(100 * time.Second)
		synctest.Wait()
		closings := w.roomserver.closings()
		require.Len(t, closings, len(fast)+len(slow))
		for i, c := range closings[len(fast):] {
			require.Equal(t, slow[i].ID, c.closes)
		}
	})
}

// With more rooms than places, those with the earliest deadlines are first.
func TestEarliestRoomsFirst(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 3 * lanes.Places}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		const rooms = 3 * lanes.Places
		for i := range rooms {
			w.message(fmt.Sprintf("!room%d", i), time.Minute+time.Duration(rooms-i)*time.Millisecond)
		}
		w.restart(2 * time.Minute)
		time.Sleep(time.Minute)
		synctest.Wait()
		closings := w.roomserver.closings()
		require.Len(t, closings, rooms)
		for i, c := range closings {
			var n int
			_, err := fmt.Sscanf(c.closes, "$event%d", &n)
			require.NoError(t, err)
			require.InDelta(t, rooms-i, n, lanes.Places, "of these %d are served at the same time", lanes.Places)
		}
	})
}
