package expiration

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

// unsendable is a hook for an event that can never be sent.
func unsendable(Event) error { return &UnsendableError{Cause: errors.New("HTTP 500")} }

func panics(Event) error { panic("content that makes no sense") }

// An unsendable event is given up after maxUnsendable attempts. A passing fault does not count.
func TestUnsendableEventsAreGivenUp(t *testing.T) {
	for name, hook := range map[string]func(Event) error{"unsendable": unsendable, "panics": panics} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				var attempts atomic.Int32
				w.roomserver.set(hooks{beforeClaim: func(e Event) error { attempts.Add(1); return hook(e) }})
				e := w.state("key", 10*time.Second)
				delayID := w.schedule(later("!other"), "a", 10*time.Second)
				time.Sleep(time.Minute)
				synctest.Wait()
				require.EqualValues(t, 2*maxUnsendable, attempts.Load())
				require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
				require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.drops.WithLabelValues(string(Unsendable))))
				d, err := w.DelayedEvent(t.Context(), delayID, "")
				require.NoError(t, err)
				require.Contains(t, string(d.Final.Error), string(Unsendable))
				require.Zero(t, w.store.len())
			})
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				w.roomserver.set(hooks{beforeClaim: hook})
				e := w.message("!room", time.Hour)
				var dropped *DropError
				times := map[string]int{"unsendable": 1, "panics": maxUnsendable}[name]
				for range times - 1 {
					require.ErrorAs(t, w.End(t.Context(), w.hash(e)), new(*UnsendableError), "the timer goes on")
				}
				require.ErrorAs(t, w.End(t.Context(), w.hash(e)), &dropped)
				require.Equal(t, Unsendable, dropped.Reason)
				require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
				delayID := w.schedule(later("!room"), "b", time.Hour)
				for range times - 1 {
					require.ErrorAs(t, w.SendDelayed(t.Context(), delayID, ""), new(*UnsendableError))
				}
				require.ErrorAs(t, w.SendDelayed(t.Context(), delayID, ""), &dropped)
			})
		})
	}
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: fails})
		e := w.state("key", 10*time.Second)
		time.Sleep(24 * time.Hour)
		w.roomserver.set(hooks{})
		time.Sleep(lastPause)
		w.wantClosings(e)
	})
}

// A panic leaves no lock behind, and the room's next timer gets its turn.
func TestPanicsHoldNothing(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		bad, good := w.state("bad", 10*time.Second), w.state("good", 11*time.Second)
		w.roomserver.set(hooks{beforeClaim: func(e Event) error {
			if e.ID == bad.ID {
				panic("content that makes no sense")
			}
			return nil
		}})
		time.Sleep(11 * time.Second)
		w.wantClosings(good)
		time.Sleep(time.Minute)
		w.state("bad", time.Hour)
	})
}

// An event that the roomserver never answers is eventually given up, but not while the roomserver answers no event at all.
func TestUnansweredEventsAreGivenUp(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.silence("!room", true)
		w.roomserver.set(hooks{wake: fails})
		e := w.state("key", 10*time.Second)
		delayID := w.schedule(later("!room"), "c", 10*time.Second)
		time.Sleep(24 * time.Hour)
		require.Equal(t, 2, w.store.len())
		w.roomserver.set(hooks{})
		time.Sleep(time.Hour)
		require.Equal(t, 2, w.store.len())
		time.Sleep(6 * time.Hour)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		d, err := w.DelayedEvent(t.Context(), delayID, "")
		require.NoError(t, err)
		require.Contains(t, string(d.Final.Error), string(Unanswered))
		require.Zero(t, w.store.len())
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
