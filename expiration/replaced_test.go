package expiration

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

func TestReplacement(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		old := w.state("key", 10*time.Second)
		other := w.state("other", time.Hour)
		e := w.state("key", 20*time.Second)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(old)), ErrNotFound)
		require.NoError(t, w.Refresh(t.Context(), w.hash(other)))
		require.Equal(t, 2, w.store.len())
		time.Sleep(15 * time.Second)
		w.wantClosings()
		time.Sleep(10 * time.Second)
		w.wantClosings(e)
	})
}

// A sender who replaces an event does not wait until the state of the room is checked. Still, the old token is invalid at once, and the old
// timer no longer counts against the limit. The timer ends when the stream reports the change, or a second later.
func TestReplacedHere(t *testing.T) {
	for name, use := range map[string]func(*testing.T, *world, Event){
		"refresh": func(t *testing.T, w *world, old Event) {
			require.ErrorIs(t, w.Refresh(t.Context(), w.hash(old)), ErrNotFound)
		},
		"end": func(t *testing.T, w *world, old Event) {
			require.ErrorIs(t, w.End(t.Context(), w.hash(old)), ErrNotFound)
		},
		"delegate": func(t *testing.T, w *world, old Event) {
			_, err := w.Find(t.Context(), w.keptOf(old), "", "")
			require.ErrorIs(t, err, ErrNotFound)
		},
		"send": func(t *testing.T, w *world, old Event) { w.message("!room", 20*time.Second) },
		"hear": func(t *testing.T, w *world, old Event) {
			require.NoError(t, w.StateRemoved(t.Context(), old.ID))
			require.Equal(t, 1, w.store.len())
		},
		"wait":                  func(t *testing.T, w *world, old Event) { time.Sleep(lookAgainAfter + time.Millisecond) },
		"wait for the deadline": func(t *testing.T, w *world, old Event) { time.Sleep(15 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
				old := w.state("key", 10*time.Second)
				looked := errors.New("somebody goes through the state")
				w.roomserver.set(hooks{look: func(Event) error { return looked }})
				e := w.state("key", 20*time.Second)
				w.roomserver.set(hooks{})
				require.Len(t, w.timersIn("!room"), 2)
				use(t, w, old)
				time.Sleep(lookAgainAfter + sweepPause)
				require.False(t, w.known(w.hash(old)))
				require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
				require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.drops.WithLabelValues("replaced")))
				require.Zero(t, testutil.ToFloat64(w.metrics.errors.WithLabelValues("current_state")))
				time.Sleep(21 * time.Second)
				w.wantNoRows()
				for _, closing := range w.roomserver.closings() {
					require.NotEqual(t, old.ID, closing.closes)
				}
			})
		})
	}
}

// The old token is also invalid if the process dies before the check, even before the sender has an answer.
func TestReplacedBeforeACrash(t *testing.T) {
	for _, answered := range []bool{true, false} {
		inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
			old, other := w.state("key", time.Hour), w.state("other", time.Hour)
			s, _ := old.State()
			newer := Event{ID: "$newer", RoomID: s.RoomID, Type: s.Type, StateKey: &s.Key}
			require.NoError(t, w.StateComes(t.Context(), s, newer.ID))
			w.roomserver.send(newer)
			if answered {
				w.StateSent(s, newer.ID)
			}
			w.restart(time.Second)
			require.ErrorIs(t, w.Refresh(t.Context(), w.hash(old)), ErrNotFound)
			require.NoError(t, w.Refresh(t.Context(), w.hash(other)))
			w.restart(time.Second)
			require.Len(t, w.timersIn(s.RoomID), 1)
		})
	}
}

// A timer that was doubted but whose event was not replaced is checked after a crash, and goes on.
func TestNotReplacedBeforeACrash(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		s, _ := e.State()
		require.NoError(t, w.StateComes(t.Context(), s, "$lost"))
		w.restart(time.Second)
		require.True(t, w.isDoubtful(w.ofEvent(e.ID)))
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		time.Sleep(lookAgainAfter)
		synctest.Wait()
		require.False(t, w.isDoubtful(w.ofEvent(e.ID)))
		time.Sleep(10*time.Second - lookAgainAfter)
		w.wantClosings(e)
	})
}

// The stream reports that each closing event replaced its original, possibly before the roomserver has answered.
func TestStreamTellsOfTheClosingEvent(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		s, _ := e.State()
		told := false
		w.roomserver.set(hooks{afterClaim: func(Event) error {
			w.roomserver.set(hooks{look: func(Event) error { t.Error("the engine asks whether the event was replaced"); return nil }})
			told = true
			return errors.Join(
				w.StateRemoved(t.Context(), e.ID), w.StateChanged(t.Context(), s, "$closing"), w.RoomChanged(t.Context(), s.RoomID),
			)
		}})
		time.Sleep(11 * time.Second)
		w.wantClosings(e)
		require.True(t, told)
	})
}

// On PostgreSQL the stream reports a change before the roomserver has committed it.
func TestStreamIsFasterThanTheRoomserver(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e, kept := w.state("key", time.Hour), w.state("kept", 10*time.Second)
		s, _ := e.State()
		require.NoError(t, w.StateRemoved(t.Context(), e.ID))
		require.NoError(t, w.StateRemoved(t.Context(), kept.ID))
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		w.roomserver.sendRemote(s.RoomID, s.Type, s.Key)
		time.Sleep(lookAgainAfter)
		synctest.Wait()
		require.Zero(t, testutil.ToFloat64(w.metrics.closings.WithLabelValues("expired")))
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.drops.WithLabelValues("replaced")))
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		time.Sleep(10 * time.Second)
		w.wantClosings(kept)
	})
}

// State that anybody sets does not concern the delayed events for it, in whatever way the engine learns of it.
func TestStateLeavesDelayedEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		for i, key := range []string{"own", "told", "removed", "rewritten", "untold"} {
			w.schedule(leave(key), key, time.Duration(10+i)*time.Second)
		}
		now := w.schedule(leave("told"), "now", time.Hour)
		w.set(leave("own"), alice)
		w.set(leave("told"), bob)
		s, _ := leave("told").State()
		require.NoError(t, w.StateChanged(t.Context(), s, "$other"))
		w.roomserver.sendRemote("!room", "m.call.member", "removed")
		require.NoError(t, w.StateRemoved(t.Context(), "$removed"))
		w.roomserver.sendRemote("!room", "m.call.member", "rewritten")
		require.NoError(t, w.RoomChanged(t.Context(), "!room"))
		w.roomserver.sendRemote("!room", "m.call.member", "untold")
		require.NoError(t, w.SendDelayed(t.Context(), now, alice))
		w.restart(time.Second)
		time.Sleep(time.Minute)
		w.wantSent("now", "own", "told", "removed", "rewritten", "untold")
	})
}
