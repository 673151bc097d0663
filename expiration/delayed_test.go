package expiration

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

func TestDelayedEventIsSentWhenDue(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		require.True(t, w.knownDelayed(delayID))
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantSent()
		require.Nil(t, w.final(delayID))
		time.Sleep(time.Nanosecond)
		w.wantSent("left")
		require.Equal(t, &Final{At: w.stored(time.Now()), EventID: w.roomserver.sent()[0].eventID}, w.final(delayID))
		require.False(t, w.knownDelayed(delayID))
		require.Zero(t, w.store.len())
		require.True(t, w.index.Empty())
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.finalised.WithLabelValues("sent")))
		time.Sleep(time.Hour)
		w.wantSent("left")
	})
}

func TestRestartPutsADelayedEventOff(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		for range 20 {
			time.Sleep(9 * time.Second)
			require.NoError(t, w.RestartDelayed(t.Context(), delayID, alice))
		}
		require.ErrorIs(t, w.RestartDelayed(t.Context(), delayID, bob), ErrNotFound)
		require.ErrorIs(t, w.RestartDelayed(t.Context(), "guess", ""), ErrNotFound)
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantSent()
		time.Sleep(time.Nanosecond)
		w.wantSent("left")
		wantFinalised(t, w.RestartDelayed(t.Context(), delayID, alice), Final.Sent)
		wantFinalised(t, w.RestartDelayed(t.Context(), delayID, ""), Final.Sent)
		require.ErrorIs(t, w.RestartDelayed(t.Context(), delayID, bob), ErrNotFound)
	})
}

func TestDelayedEventIsSentNow(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", time.Hour)
		require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, bob), ErrNotFound)
		w.wantSent()
		require.NoError(t, w.SendDelayed(t.Context(), delayID, ""))
		w.wantSent("left")
		w.wantFinal(delayID, Final.Sent)
		wantFinalised(t, w.SendDelayed(t.Context(), delayID, alice), Final.Sent)
		wantFinalised(t, w.CancelDelayed(t.Context(), delayID, alice), Final.Sent)
		require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, bob), ErrNotFound)
		time.Sleep(2 * time.Hour)
		w.wantSent("left")
	})
}

func TestSendingSurvivesACallerWhoHangsUp(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", time.Hour)
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = w.SendDelayed(ctx, delayID, alice) }()
		synctest.Wait()
		cancel()
		time.Sleep(2 * time.Second)
		w.wantSent("left")
	})
}

func TestDelayedEventIsCancelled(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		require.ErrorIs(t, w.CancelDelayed(t.Context(), delayID, bob), ErrNotFound)
		time.Sleep(time.Second)
		require.NoError(t, w.CancelDelayed(t.Context(), delayID, alice))
		require.Equal(t, &Final{At: w.stored(time.Now())}, w.final(delayID))
		require.Zero(t, w.store.len())
		require.True(t, w.index.Empty())
		w.restart(time.Minute)
		w.wantSent()
		wantFinalised(t, w.CancelDelayed(t.Context(), delayID, ""), Final.Cancelled)
		wantFinalised(t, w.SendDelayed(t.Context(), delayID, alice), Final.Cancelled)
		wantFinalised(t, w.RestartDelayed(t.Context(), delayID, alice), Final.Cancelled)
		require.ErrorIs(t, w.CancelDelayed(t.Context(), delayID, bob), ErrNotFound)
		w.wantSent()
	})
}

func TestDelayedEventsOfARoomComeInOrder(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: func(e Event) error {
			if e.RoomID == "!room" {
				time.Sleep(3 * time.Second)
			}
			return nil
		}})
		w.schedule(later("!room"), "third", 12*time.Second)
		w.schedule(leave("key"), "first", 10*time.Second)
		w.schedule(leave("key"), "second", 11*time.Second) // both are sent, for the same state
		w.schedule(later("!other"), "elsewhere", 11*time.Second)
		time.Sleep(19*time.Second - time.Nanosecond)
		w.wantSent("elsewhere", "first", "second")
		time.Sleep(time.Nanosecond)
		w.wantSent("elsewhere", "first", "second", "third")
		s, _ := leave("key").State()
		require.Equal(t, w.roomserver.sent()[2].eventID, w.roomserver.current(s))
	})
}

// State that the room has already is not sent, but the delayed event is finalised as sent.
func TestDelayedStateThatTheRoomHas(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		first := w.schedule(leave("key"), "left", time.Second)
		time.Sleep(time.Second)
		w.wantSent("left")
		due, now := w.schedule(leave("key"), "left", 10*time.Second), w.schedule(leave("key"), "left", time.Minute)
		w.store.set(false, failing("finalise"))
		require.ErrorIs(t, w.SendDelayed(t.Context(), now, alice), errFault)
		w.store.set(false, nil)
		require.NoError(t, w.SendDelayed(t.Context(), now, alice))
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		time.Sleep(10*time.Second + 500*time.Millisecond)
		require.NoError(t, w.RestartDelayed(t.Context(), due, alice))
		time.Sleep(10 * time.Second)
		require.Nil(t, w.final(due))
		time.Sleep(time.Minute)
		w.wantSent("left")
		for _, delayID := range []string{due, now} {
			require.Equal(t, "$delayed1", w.final(delayID).EventID)
		}
		delayIDs, err := w.DelayIDs(t.Context(), alice, []string{"$delayed1"})
		require.NoError(t, err)
		require.Equal(t, map[string]string{"$delayed1": first}, delayIDs)
		require.Zero(t, w.store.len())
	})
}

// A delayed event can be an expiring event too, from the moment when it is sent.
func TestDelayedEventThatExpires(t *testing.T) {
	schedule := func(w *world, delay time.Duration) string {
		delayID, err := w.Schedule(w.t.Context(), leave("key"), Delayed{Content: []byte("here"), Expires: 20 * time.Second}, delay, false)
		require.NoError(w.t, err)
		return delayID
	}
	sent := func(w *world) Event {
		return Event{ID: w.roomserver.sent()[0].eventID, Sender: alice}
	}
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		schedule(w, 10*time.Second)
		time.Sleep(10 * time.Second)
		w.wantSent("here")
		require.True(t, w.Running(sent(w).ID, alice))
		time.Sleep(19 * time.Second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(sent(w))))
		time.Sleep(20*time.Second - time.Nanosecond)
		w.wantClosings()
		time.Sleep(time.Nanosecond)
		w.wantClosings(sent(w))
		w.wantNoRows()
		require.True(t, w.index.Empty())
		require.Zero(t, w.store.len())
	})
	// The expiring event's timer is stored before the event is sent, whatever happens in between.
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := schedule(w, 10*time.Second)
		w.roomserver.set(hooks{afterClaim: fails})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.roomserver.set(hooks{})
		w.restart(time.Second)
		w.wantSent("here")
		require.True(t, w.Running(sent(w).ID, alice))
		require.Equal(t, sent(w).ID, w.final(delayID).EventID)
		time.Sleep(20 * time.Second)
		w.wantClosings(sent(w))
		require.Zero(t, w.store.len())
	})
	// A delayed event that was restarted while it was being built was not sent, and leaves no timer behind.
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := schedule(w, 10*time.Second)
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		time.Sleep(10*time.Second + 500*time.Millisecond)
		require.NoError(t, w.RestartDelayed(t.Context(), delayID, alice))
		time.Sleep(5 * time.Second)
		w.wantSent()
		require.Equal(t, 1, w.store.len())
		time.Sleep(6 * time.Second)
		w.wantSent("here")
		time.Sleep(21 * time.Second)
		w.wantClosings(sent(w))
	})
	// With too many events running, a request to send gets an error, and an event that is due is refused.
	inWorld(t, Config{MaxRunningPerUser: 1}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Minute)
		delayID := schedule(w, 10*time.Second)
		var limit *LimitError
		require.ErrorAs(t, w.SendDelayed(t.Context(), delayID, alice), &limit)
		require.Nil(t, w.final(delayID))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.wantFinal(delayID, func(f Final) bool { return strings.Contains(string(f.Error), "too many timers of the user") })
		time.Sleep(time.Minute)
		w.wantSent()
		w.wantClosings(e)
	})
}

// An application service's delayed event that expires once it is sent has no limit of running events, also after a restart.
func TestServicesDelayedEventThatExpires(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 1}, func(t *testing.T, w *world) {
		w.message("!room", time.Hour)
		for _, service := range []bool{true, false} {
			d := Delayed{Content: []byte("here"), Expires: time.Hour}
			_, err := w.Schedule(t.Context(), later("!room"), d, 10*time.Second, service)
			require.NoError(t, err)
		}
		w.restart(0)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.wantSent("here")
	})
}

// Of the delayed events of one user that are due, too many at once are refused. Other users, application services, and requests to send
// do not count.
func TestLimitOfDueEvents(t *testing.T) {
	inWorld(t, Config{DueLimit: RateLimit{Threshold: 2, Cooloff: 10 * time.Second}}, func(t *testing.T, w *world) {
		now := w.schedule(later("!room"), "now", time.Hour)
		require.NoError(t, w.SendDelayed(t.Context(), now, alice))
		w.schedule(later("!room"), "first", time.Second)
		w.schedule(later("!room"), "second", 2*time.Second)
		third := w.schedule(later("!room"), "third", 3*time.Second)
		service, err := w.Schedule(t.Context(), later("!room"), Delayed{Content: []byte("service")}, 4*time.Second, true)
		require.NoError(t, err)
		other := later("!room")
		other.Sender = bob
		_, err = w.Schedule(t.Context(), other, Delayed{Content: []byte("other")}, 5*time.Second, false)
		require.NoError(t, err)
		w.schedule(later("!room"), "fourth", 7*time.Second)
		require.NotEmpty(t, service)
		time.Sleep(time.Minute)
		w.wantSent("now", "first", "second", "service", "other", "fourth")
		w.wantFinal(third, failed)
		time.Sleep(pruneInterval)
		synctest.Wait()
		require.Empty(t, w.due)
	})
}

// An event counts when it is sent, and once: neither attempts that fail nor a restart in between use up the sender's limit.
func TestFailedAttemptsDoNotCountAsDue(t *testing.T) {
	limit := RateLimit{Threshold: 100, Cooloff: 1000 * time.Hour}
	for _, fault := range []string{"read", "claim", "build", "input"} {
		inWorld(t, Config{DueLimit: limit, MaxScheduledPerUser: 200}, func(t *testing.T, w *world) {
			for i := range limit.Threshold - 1 {
				w.schedule(later(fmt.Sprintf("!room%d", i%10)), "x", 10*time.Second)
			}
			restarted := w.schedule(later("!room"), "restarted", 10*time.Second)
			w.setFault(fault, false)
			time.Sleep(time.Minute)
			require.Empty(t, w.roomserver.sent())
			if fault != "input" { // then it is claimed
				require.NoError(t, w.RestartDelayed(t.Context(), restarted, alice))
			}
			w.setFault("", false)
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			require.Len(t, w.roomserver.sent(), limit.Threshold)
			w.wantFinal(restarted, Final.Sent)
			tooMany := w.schedule(later("!room"), "one more", time.Second)
			time.Sleep(time.Second)
			synctest.Wait()
			w.wantFinal(tooMany, failed)
		})
	}
}

// A claim that fails in memory, because a write to the row hangs, is not a claim.
func TestDelayedStateThatTheRoomHasAndThatCannotBeClaimed(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.schedule(leave("key"), "same", time.Second)
		time.Sleep(time.Second)
		w.wantSent("same")
		delayID := w.schedule(leave("key"), "same", time.Second)
		tm, err := w.delayedTimer(HashToken(delayID), alice)
		require.NoError(t, err)
		var unlock func()
		w.roomserver.set(hooks{beforeClaim: func(Event) error {
			unlock, err = w.lockRow(t.Context(), tm)
			return err
		}})
		time.Sleep(time.Second + attemptTimeout)
		synctest.Wait()
		require.False(t, tm.Unanswered)
		w.roomserver.set(hooks{})
		unlock()
		time.Sleep(time.Minute)
		w.wantFinal(delayID, Final.Sent)
	})
}
