package expiration

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRestart(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		third, first, second := w.message("!room", 30*time.Second), w.message("!room", 10*time.Second), w.message("!room", 20*time.Second)
		later := w.message("!room", 2*time.Minute)
		w.restart(time.Minute)
		w.wantClosings(first, second, third)
		require.NoError(t, w.Refresh(t.Context(), w.hash(later)))
		time.Sleep(2*time.Minute - time.Millisecond)
		w.wantClosings(first, second, third)
		time.Sleep(time.Millisecond)
		w.wantClosings(first, second, third, later)
	})
}

func TestRestartGrace(t *testing.T) {
	inWorld(t, Config{RestartGrace: 30 * time.Second}, func(t *testing.T, w *world) {
		overdue, alive, later := w.message("!room", 10*time.Second), w.message("!room", 20*time.Second), w.message("!room", 100*time.Second)
		w.restart(time.Minute)
		time.Sleep(29 * time.Second)
		w.wantClosings()
		require.NoError(t, w.Refresh(t.Context(), w.hash(alive)))
		time.Sleep(2 * time.Second)
		w.wantClosings(overdue)
		time.Sleep(18 * time.Second)
		w.wantClosings(overdue, later, alive)
	})
}

// An attempt fails in passing, and the room's next event is claimed before the process dies. The next process still keeps the order.
func TestOrderAfterACrash(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		first, second := w.message("!room", 10*time.Second), w.message("!room", 11*time.Second)
		third, elsewhere := w.message("!room", 12*time.Second), w.message("!elsewhere", 9*time.Second)
		w.roomserver.set(hooks{
			beforeClaim: func(e Event) error {
				if e.ID == second.ID {
					return nil
				}
				return errFault
			},
			afterClaim: fails,
		})
		time.Sleep(20 * time.Second)
		synctest.Wait()
		w.restart(0)
		w.wantClosings()
		w.roomserver.set(hooks{})
		w.restart(0)
		synctest.Wait()
		ids := map[string][]string{} // by room, because rooms do not wait for one another
		for _, c := range w.roomserver.closings() {
			ids[c.roomID] = append(ids[c.roomID], c.closes)
		}
		require.Equal(t, map[string][]string{"!room": {first.ID, second.ID, third.ID}, "!elsewhere": {elsewhere.ID}}, ids)
	})
}

// Rows with no digest, or with one under another key, are read whole.
func TestOtherDigests(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		none := w.message("!room", 20*time.Second)
		clear(w.store.digests)
		other := w.message("!room", 20*time.Second)
		token := w.hash(other)
		w.secret = "another"
		w.restart(time.Second)
		own := w.message("!room", 20*time.Second)
		require.True(t, w.known(token), "tokens are valid as long as their events run")
		w.restart(time.Second)
		for _, e := range []Event{other, none, own} {
			require.Len(t, w.timersIn(e.RoomID), 3)
		}
		w.DropSender(t.Context(), "!room", none.Sender, time.Now())
		w.wantNoRows()
	})
}

// With a grace period after a restart, overdue events are still closed in the order of their deadlines.
func TestOrderAfterAGracePeriod(t *testing.T) {
	inWorld(t, Config{RestartGrace: 30 * time.Second}, func(t *testing.T, w *world) {
		events := make([]Event, 20)
		for _, i := range rand.New(rand.NewPCG(1, 0)).Perm(len(events)) {
			events[i] = w.message("!room", time.Duration(10+i)*time.Second)
		}
		w.restart(time.Minute)
		time.Sleep(time.Minute)
		w.wantClosings(events...)
	})
}

// Whenever the process dies, the next one finishes the work, and nothing is sent twice.
func TestRestartOfTheProcess(t *testing.T) {
	t.Run("scheduled", func(t *testing.T) {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			overdue, running := w.schedule(leave("key"), "overdue", 10*time.Second), w.schedule(later("!room"), "running", 2*time.Minute)
			w.restart(time.Minute)
			w.wantSent("overdue")
			w.wantFinal(overdue, Final.Sent)
			require.NoError(t, w.RestartDelayed(t.Context(), running, alice))
			time.Sleep(2*time.Minute - time.Nanosecond)
			w.wantSent("overdue")
			time.Sleep(time.Nanosecond)
			w.wantSent("overdue", "running")
		})
	})
	t.Run("in the grace period", func(t *testing.T) {
		inWorld(t, Config{RestartGrace: 30 * time.Second}, func(t *testing.T, w *world) {
			w.schedule(leave("key"), "left", 10*time.Second)
			w.restart(time.Minute)
			time.Sleep(30*time.Second - time.Nanosecond)
			w.wantSent()
			time.Sleep(time.Nanosecond)
			w.wantSent("left")
		})
	})
	for step, interrupt := range map[string]func(*world){
		"claimed and not sent": func(w *world) { w.roomserver.set(hooks{afterClaim: fails}) },
		"claimed, and nobody knows": func(w *world) {
			w.store.set(true, failing("claim"))
			w.roomserver.set(hooks{afterClaim: fails})
		},
		"not claimed, and nobody knows": func(w *world) { w.store.set(false, failing("claim")) },
		"sent and not finalised":        func(w *world) { w.store.set(false, failing("finalise")) },
		"finalised, and nobody knows":   func(w *world) { w.store.set(true, failing("finalise")) },
	} {
		t.Run(step, func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				delayID := w.schedule(leave("key"), "left", 10*time.Second)
				interrupt(w)
				time.Sleep(10 * time.Second)
				synctest.Wait()
				w.restart(time.Second)
				w.store.set(false, nil)
				w.roomserver.set(hooks{})
				w.restart(time.Second)
				time.Sleep(time.Minute)
				w.wantSent("left")
				require.Equal(t, w.roomserver.sent()[0].eventID, w.final(delayID).EventID)
				require.Zero(t, w.store.len())
				require.Empty(t, w.inFlight)
			})
		})
	}
}

// Delayed events wait no longer than maxDelayedGrace after a start, and no less than a shorter grace period.
func TestRestartGraceOfDelayedEvents(t *testing.T) {
	for grace, wait := range map[time.Duration]time.Duration{0: 0, 10 * time.Second: 10 * time.Second, time.Hour: maxDelayedGrace} {
		inWorld(t, Config{RestartGrace: grace}, func(t *testing.T, w *world) {
			w.schedule(leave("key"), "left", time.Second)
			w.restart(time.Minute)
			if wait > 0 {
				time.Sleep(wait - time.Nanosecond)
				synctest.Wait()
				w.wantSent()
			}
			time.Sleep(time.Nanosecond)
			w.wantSent("left")
		})
	}
}
