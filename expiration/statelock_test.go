package expiration

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A send first finishes a half-done closing event, so that this does not arrive after it. If it cannot, it does not wait longer.
func TestLockStateFinishesClosings(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: fails})
		old := w.state("key", 10*time.Second)
		time.Sleep(11 * time.Second)
		s, _ := old.State()
		unlock, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		unlock()
		w.wantClosings()
		w.roomserver.set(hooks{})
		e := w.state("key", time.Hour)
		w.wantClosings(old)
		require.Equal(t, e.ID, w.roomserver.current(s))
		time.Sleep(time.Minute)
		w.wantClosings(old)
		require.Equal(t, e.ID, w.roomserver.current(s))
	})
}

func TestLockStateObeysContext(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		s := StateKey{"!room", "m", "key"}
		unlock, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = w.LockState(ctx, s)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		unlock()
		require.Zero(t, w.states.Len(), "unused locks are removed")
	})
}

// A send waits only a short time for an event of the same state that the roomserver does not answer.
func TestSendsGoPastUnansweredEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.silence("!room", true)
		old := w.state("key", 10*time.Second)
		s, _ := old.State()
		time.Sleep(11 * time.Second)
		for range 10 {
			began := time.Now()
			unlock, err := w.LockState(t.Context(), s)
			require.NoError(t, err)
			unlock()
			require.LessOrEqual(t, time.Since(began), sendPatience+10*time.Millisecond)
			time.Sleep(time.Second)
		}
		w.roomserver.silence("!room", false)
		time.Sleep(2 * lastPause)
		w.wantClosings(old)
	})
}

// A send waits for another send without a limit, because otherwise both would have the same prev events.
func TestSendsWaitForOneAnother(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		s := StateKey{"!room", "m.call.member", "key"}
		unlock, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		began := time.Now()
		time.AfterFunc(10*sendPatience, unlock)
		unlock, err = w.LockState(t.Context(), s)
		require.NoError(t, err)
		unlock()
		require.Equal(t, 10*sendPatience, time.Since(began))
	})
}

// A send of a type that state resolution orders by power waits for the attempt, because its later time would not make it win.
func TestPowerGoesPastNoAttempt(t *testing.T) {
	for eventType, past := range map[string]bool{
		"m.call.member": true, "m.room.topic": true, "m.room.power_levels": false, "m.room.join_rules": false,
	} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			s := StateKey{RoomID: "!room", Type: eventType}
			key := ""
			e := Event{ID: "$e", RoomID: s.RoomID, Type: s.Type, StateKey: &key, Sender: alice}
			w.send(e, 10*time.Second)
			w.roomserver.silence("!room", true)
			time.Sleep(10 * time.Second)
			synctest.Wait() // the event is claimed, and not answered
			began := time.Now()
			unlock, err := w.LockState(t.Context(), s)
			require.NoError(t, err)
			unlock()
			require.Equal(t, past, time.Since(began) < attemptTimeout-time.Second, "%s: %s", eventType, time.Since(began))
		})
	}
}
