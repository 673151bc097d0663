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

// A request to send an unsendable delayed event gets the error at once, and the event stays scheduled. If it was given to its room, it is on
// its way, and is tried again.
func TestUnsendableDelayedEventsStayScheduled(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		var attempts atomic.Int32
		counted := func(e Event) error { attempts.Add(1); return unsendable(e) }
		send := func(delayID string) {
			t.Helper()
			attempts.Store(0)
			require.ErrorAs(t, w.SendDelayed(t.Context(), delayID, alice), new(*UnsendableError))
			require.EqualValues(t, 1, attempts.Load())
			require.Nil(t, w.final(delayID))
		}
		first, second := w.schedule(later("!room"), "first", time.Hour), w.schedule(later("!room"), "second", time.Hour)
		w.roomserver.set(hooks{beforeClaim: counted})
		for range 2 * maxUnsendable {
			send(first)
		}
		w.roomserver.set(hooks{})
		require.NoError(t, w.RestartDelayed(t.Context(), first, alice))
		require.NoError(t, w.SendDelayed(t.Context(), first, alice))

		w.roomserver.set(hooks{afterClaim: counted})
		for range 2 * maxUnsendable {
			send(second)
		}
		wantFinalised(t, w.RestartDelayed(t.Context(), second, alice), Final.Sent)
		wantFinalised(t, w.CancelDelayed(t.Context(), second, alice), Final.Sent)
		require.Len(t, w.list(alice, ""), 1)
		w.roomserver.set(hooks{})
		time.Sleep(lastPause)
		w.wantSent("first", "second")

		third := w.schedule(later("!room"), "third", time.Hour)
		w.roomserver.set(hooks{afterClaim: counted})
		send(third)
		time.Sleep(maxUnsendable * lastPause)
		w.wantFinal(third, failed)
		w.wantSent("first", "second")
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

// An event that the roomserver refuses to take with a passing error is eventually given up, but not while it takes no event at all.
func TestEventsThatAreNeverTakenAreGivenUp(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		var all atomic.Bool
		all.Store(true)
		delayID := w.schedule(later("!room"), "bad", 10*time.Second)
		w.roomserver.set(hooks{afterClaim: func(e Event) error {
			if all.Load() || e.RoomID == "!room" {
				return errFault
			}
			return nil
		}})
		time.Sleep(24 * time.Hour)
		require.Nil(t, w.final(delayID))
		all.Store(false)
		for range 150 {
			w.schedule(later("!other"), "good", time.Second)
			time.Sleep(40 * time.Second)
		}
		require.Contains(t, string(w.final(delayID).Error), string(Unanswered))
		require.Zero(t, w.store.len())
	})
}

// Requests do not make the engine give up an event, however often they are repeated during a short fault.
func TestRepeatedRequestsGiveNothingUp(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e, delayID := w.state("key", time.Hour), w.schedule(later("!room"), "c", time.Hour)
		w.schedule(later("!other"), "good", time.Second)
		time.Sleep(2 * time.Second)
		w.roomserver.set(hooks{afterClaim: fails})
		for range 2 * givenUpAfter {
			require.ErrorIs(t, w.End(t.Context(), w.hash(e)), errFault)
			require.Error(t, w.SendDelayed(t.Context(), delayID, alice))
			time.Sleep(50 * time.Millisecond)
		}
		w.roomserver.set(hooks{})
		time.Sleep(lastPause)
		w.wantClosings(e)
		w.wantSent("good", "c")
	})
}
