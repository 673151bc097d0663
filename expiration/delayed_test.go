package expiration

import (
	"context"
	"fmt"
	"strings"
	"sync"
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

// After a cancellation failed, the write may have happened or not. The timers find out before they send anything.
func TestCancellationThatFails(t *testing.T) {
	for _, written := range []bool{false, true} {
		for _, next := range []string{"cancel", "restart", "send", "wait", "process restart"} {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				delayID := w.schedule(leave("key"), "left", 10*time.Second)
				w.store.set(written, failing("finalise"))
				require.ErrorIs(t, w.CancelDelayed(t.Context(), delayID, alice), errFault)
				w.store.set(false, nil)
				var err error
				switch next {
				case "cancel":
					err = w.CancelDelayed(t.Context(), delayID, alice)
				case "restart":
					err = w.RestartDelayed(t.Context(), delayID, alice)
				case "send":
					err = w.SendDelayed(t.Context(), delayID, alice)
				case "process restart":
					w.restart(0)
				}
				if written && next != "wait" && next != "process restart" {
					wantFinalised(t, err, Final.Cancelled)
				} else {
					require.NoError(t, err)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				cancelled := written || next == "cancel"
				require.Equal(t, cancelled, w.final(delayID).Cancelled())
				if cancelled {
					w.wantSent()
				} else {
					w.wantSent("left")
				}
				require.True(t, w.index.Empty())
			})
		}
	}
}

// After a claim failed, the event may be claimed or not. Cancelling, restarting and sending find out.
func TestActionsAfterAClaimThatFailed(t *testing.T) {
	for _, written := range []bool{false, true} {
		for action, is := range map[string]func(Final) bool{
			"cancel": Final.Cancelled, "restart": Final.Sent, "send": Final.Sent, "list": Final.Sent,
		} {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				delayID := w.schedule(leave("key"), "left", 10*time.Second)
				w.store.set(written, failing("claim"))
				time.Sleep(10 * time.Second)
				synctest.Wait()
				w.store.set(false, nil)
				act := map[string]func(context.Context, string, string) error{
					"cancel": w.CancelDelayed, "restart": w.RestartDelayed, "send": w.SendDelayed,
				}[action]
				switch {
				case action == "list":
					require.Len(t, w.list(alice, ""), map[bool]int{false: 1}[written])
				case written:
					wantFinalised(t, act(t.Context(), delayID, alice), Final.Sent)
					is = Final.Sent
				default:
					require.NoError(t, act(t.Context(), delayID, alice))
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				w.wantFinal(delayID, is)
				require.Len(t, w.roomserver.sent(), map[bool]int{true: 1}[w.final(delayID).Sent()])
			})
		}
	}
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

// Whichever operation fails in passing, and whether it is written or not, the event is sent once and its result is known.
func TestPassingFaultsOfDelayedEvents(t *testing.T) {
	for _, fault := range []string{"read", "claim", "finalise", "build", "input", "replaced"} {
		for _, written := range []bool{false, true} {
			for _, now := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s written=%t now=%t", fault, written, now), func(t *testing.T) {
					inWorld(t, Config{}, func(t *testing.T, w *world) {
						delayID := w.schedule(leave("key"), "left", 10*time.Second)
						switch fault {
						case "build":
							w.roomserver.set(hooks{beforeClaim: fails})
						case "input":
							w.roomserver.set(hooks{afterClaim: fails})
						case "replaced":
							w.roomserver.set(hooks{look: fails})
						default:
							w.store.set(written, failing(fault))
						}
						if now {
							require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, alice), errFault)
						}
						time.Sleep(5 * time.Minute)
						synctest.Wait()
						w.store.set(false, nil)
						w.roomserver.set(hooks{})
						time.Sleep(time.Minute)
						w.wantSent("left")
						require.Equal(t, w.roomserver.sent()[0].eventID, w.final(delayID).EventID)
						require.True(t, w.index.Empty())
						require.Empty(t, w.inFlight)
						require.Zero(t, w.store.len())
						require.True(t, w.HasSent(alice))
					})
				})
			}
		}
	}
}

// A client that keeps restarting its event while nothing can be sent keeps it from being sent.
func TestRestartDuringFaults(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: fails})
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		time.Sleep(time.Minute)
		require.NoError(t, w.RestartDelayed(t.Context(), delayID, alice))
		w.roomserver.set(hooks{})
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantSent()
		time.Sleep(time.Nanosecond)
		w.wantSent("left")
	})
}

// State that the room has already is not sent, but the delayed event is finalised as sent.
func TestDelayedStateThatTheRoomHas(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.schedule(leave("key"), "left", time.Second)
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
		require.Zero(t, w.store.len())
	})
}

// An event that is refused for good when it is due has failed. If a request asks for it earlier, it gets the refusal, and can try later.
func TestRefusedDelayedEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		never, now := w.schedule(leave("key"), "never", 10*time.Second), w.schedule(later("!room"), "now", 10*time.Second)
		w.roomserver.refuse("never", Forbidden)
		w.roomserver.refuse("now", Forbidden)
		var refused *RefusedError
		require.ErrorAs(t, w.SendDelayed(t.Context(), now, alice), &refused)
		require.Equal(t, 403, refused.Code)
		require.JSONEq(t, `{"errcode":"M_FORBIDDEN"}`, string(refused.Response))
		require.Nil(t, w.final(now), "the event stays scheduled")
		w.roomserver.refuse("now", "")
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantSent()
		time.Sleep(time.Nanosecond)
		w.wantSent("now")
		require.Equal(t, &Final{At: w.stored(time.Now()), Error: refused.Response}, w.final(never))
		wantFinalised(t, w.SendDelayed(t.Context(), never, alice), failed)
		wantFinalised(t, w.CancelDelayed(t.Context(), never, alice), failed)
		w.restart(time.Second)
		require.JSONEq(t, `{"errcode":"M_FORBIDDEN"}`, string(w.final(never).Error))
		require.Zero(t, w.store.len())
	})
}

// A refusal does not finalise an event that was restarted during the attempt.
func TestRefreshWhileAnEventIsRefused(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID, e := w.schedule(leave("key"), "left", 10*time.Second), w.state("other", 10*time.Second)
		w.roomserver.refuse("left", Forbidden)
		w.roomserver.refuse(e.ID, Forbidden)
		w.roomserver.set(hooks{beforeClaim: takes(2 * time.Second)})
		time.Sleep(11 * time.Second)
		require.NoError(t, w.RestartDelayed(t.Context(), delayID, alice))
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		time.Sleep(5 * time.Second)
		require.Nil(t, w.final(delayID))
		w.roomserver.refuse("left", "")
		w.roomserver.refuse(e.ID, "")
		time.Sleep(15 * time.Second)
		w.wantSent("left")
		w.wantClosings(e)
	})
}

func TestRoomOfADelayedEventIsPurged(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		gone, kept := w.schedule(leave("key"), "gone", 10*time.Second), w.schedule(later("!other"), "kept", 10*time.Second)
		w.DropRoom(t.Context(), "!room")
		require.JSONEq(t, `{"error":"the event is not sent: room_gone"}`, string(w.final(gone).Error))
		require.Nil(t, w.final(kept))
		time.Sleep(10 * time.Second)
		w.wantSent("kept")
	})
}

// A claimed event is sent whatever the stream reports meanwhile, because it may be in the room already.
func TestDropSparesDelayedEventsThatAreClaimed(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		w.roomserver.set(hooks{afterClaim: fails})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.set(leave("key"), bob)
		w.DropRoom(t.Context(), "!room")
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantSent("left")
		w.wantFinal(delayID, Final.Sent)
	})
}

// A delayed event survives that its sender leaves the room. It is refused, or not, when it is due.
func TestSenderOfADelayedEventLeaves(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.schedule(leave("key"), "left", 10*time.Second)
		time.Sleep(time.Second)
		w.DropSender(t.Context(), "!room", alice, time.Now())
		time.Sleep(9 * time.Second)
		w.wantSent("left")
	})
}

// Another user's state cancels the event, at once or, if it was not reported, at the deadline. State from before the event was scheduled
// does not, nor does the owner's own.
func TestReplacedDelayedEvents(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			w.set(leave("before"), bob)
			w.set(leave("own"), bob)
			w.set(leave("back"), bob)
			own, before := w.schedule(leave("own"), "own", 10*time.Second), w.schedule(leave("before"), "before", 20*time.Second)
			told, untold := w.schedule(leave("told"), "told", 10*time.Second), w.schedule(leave("untold"), "untold", 10*time.Second)
			now, rewritten := w.schedule(leave("now"), "now", 10*time.Second), w.schedule(leave("rewritten"), "rewritten", 10*time.Second)
			back := w.schedule(leave("back"), "back", time.Hour)
			if restarted {
				w.restart(time.Second)
			}
			tell := func(key string) {
				s, _ := leave(key).State()
				w.StateChanged(t.Context(), s, "")
			}
			tell("before") // reported late
			w.set(leave("own"), alice)
			w.set(leave("told"), bob)
			w.set(leave("back"), alice)
			w.set(leave("back"), bob)
			for _, key := range []string{"untold", "now", "rewritten"} {
				w.roomserver.sendRemote("!room", "m.call.member", key)
			}
			require.Nil(t, w.final(own))
			require.Nil(t, w.final(before))
			w.wantFinal(told, Final.Cancelled)
			w.wantFinal(back, Final.Cancelled)
			require.Nil(t, w.final(untold))
			wantFinalised(t, w.SendDelayed(t.Context(), now, alice), Final.Cancelled)
			s, _ := leave("rewritten").State()
			w.StateChanged(t.Context(), StateKey{s.RoomID, "another type", s.Key}, "")
			require.Nil(t, w.final(rewritten))
			require.NoError(t, w.RestartDelayed(t.Context(), untold, alice))
			w.StateChanged(t.Context(), s, "")
			w.wantFinal(rewritten, Final.Cancelled)
			time.Sleep(time.Minute)
			w.wantSent("own", "before")
			w.wantFinal(untold, Final.Cancelled)
			wantFinalised(t, w.RestartDelayed(t.Context(), told, alice), Final.Cancelled)
		})
	}
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		w.roomserver.sendRemote("!room", "m.call.member", "key")
		w.RoomChanged(t.Context(), "!room")
		w.wantFinal(delayID, Final.Cancelled)
	})
}

// If sending finds that the event must be cancelled, and that cannot be written, the error is not ErrNotFound.
func TestCancellationBySendingFails(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		w.roomserver.sendRemote("!room", "m.call.member", "key")
		w.store.set(false, failing("finalise"))
		require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, alice), errFault)
		w.store.set(false, nil)
		wantFinalised(t, w.SendDelayed(t.Context(), delayID, alice), Final.Cancelled)
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

// A repeated request gets the delay ID of the first, whatever has become of the event.
func TestRepeatedSchedule(t *testing.T) {
	inWorld(t, Config{MaxScheduledPerUser: 2}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{look: takes(time.Second)}) // by then all requests have arrived
		var wg sync.WaitGroup
		ids := make([]string, 10)
		for i := range ids {
			wg.Go(func() {
				var err error
				ids[i], err = w.Schedule(t.Context(), requested(leave("key"), 1), Delayed{Content: []byte("left")}, 10*time.Second, false)
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		w.roomserver.set(hooks{})
		delayID := ids[0]
		for _, id := range ids {
			require.Equal(t, delayID, id)
		}
		again := func() {
			t.Helper()
			require.Equal(t, delayID, w.schedule(requested(leave("key"), 1), "other", time.Hour))
			got, err := w.Scheduled(t.Context(), RequestHash{1})
			require.NoError(t, err)
			require.Equal(t, delayID, got)
		}
		another := w.schedule(requested(leave("key"), 2), "another", time.Hour)
		require.NotEqual(t, delayID, another)
		again() // although the limit is reached
		w.restart(time.Second)
		again()
		require.Equal(t, 2, w.store.len())
		time.Sleep(10 * time.Second)
		w.wantSent("left")
		again()
		w.restart(time.Second)
		again()
		require.NoError(t, w.CancelDelayed(t.Context(), another, alice))
		require.Equal(t, another, w.schedule(requested(leave("key"), 2), "another", time.Second))
		time.Sleep(time.Minute)
		w.wantSent("left")
		id, err := w.Scheduled(t.Context(), RequestHash{3})
		require.NoError(t, err)
		require.Empty(t, id)
		require.NotEqual(t, w.schedule(later("!room"), "x", time.Hour), w.schedule(later("!room"), "x", time.Hour), "without a transaction ID")
	})
}

// No delay ID is given for an event whose insertion failed, whether the row was written or not.
func TestScheduleThatFails(t *testing.T) {
	for _, written := range []bool{false, true} {
		for _, broken := range [][]string{{"insert"}, {"insert", "drop"}, {"requested"}} {
			inWorld(t, Config{MaxScheduledPerUser: 1}, func(t *testing.T, w *world) {
				w.store.set(false, func(operation string) error {
					w.store.after = written && operation == "insert"
					return failing(broken...)(operation)
				})
				for range 2 {
					_, err := w.Schedule(t.Context(), requested(leave("key"), 1), Delayed{Content: []byte("left")}, 10*time.Second, false)
					require.Error(t, err)
				}
				w.store.set(false, nil)
				delayID := w.schedule(requested(leave("key"), 1), "left", 10*time.Second)
				require.NoError(t, w.RestartDelayed(t.Context(), delayID, alice))
				time.Sleep(time.Minute)
				w.wantSent("left")
				w.wantFinal(delayID, Final.Sent)
			})
		}
	}
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{look: fails})
		_, err := w.Schedule(t.Context(), leave("key"), Delayed{Content: []byte("left")}, 10*time.Second, false)
		require.ErrorIs(t, err, errFault)
		require.Zero(t, w.store.len())
	})
}

func TestLimitOfDelayedEvents(t *testing.T) {
	inWorld(t, Config{MaxScheduledPerUser: 2, MaxRunningPerUser: 1}, func(t *testing.T, w *world) {
		w.message("!room", 5*time.Second) // running events have a limit of their own
		first := w.schedule(leave("key"), "first", 10*time.Second)
		w.schedule(leave("key"), "second", time.Minute)
		time.Sleep(4 * time.Second)
		schedule := func(sender string, exempt bool) error {
			e := leave("key")
			e.Sender = sender
			_, err := w.Schedule(t.Context(), e, Delayed{Content: []byte("x")}, time.Hour, exempt)
			return err
		}
		var limit *LimitError
		require.ErrorAs(t, schedule(alice, false), &limit)
		require.Equal(t, 6*time.Second, limit.RetryAfter)
		require.NoError(t, w.RestartDelayed(t.Context(), first, alice))
		require.ErrorAs(t, schedule(alice, false), &limit)
		require.Equal(t, 10*time.Second, limit.RetryAfter)
		require.NoError(t, schedule(bob, false), "another user's limit")
		require.NoError(t, w.CancelDelayed(t.Context(), first, alice))
		require.NoError(t, schedule(alice, false))
		require.ErrorAs(t, schedule(alice, false), &limit)
		require.NoError(t, schedule(alice, true), "exempt")
		w.restart(0)
		require.ErrorAs(t, schedule(alice, false), &limit)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		w.message("!room", time.Second) // the first event has expired
		_, err := w.Begin(t.Context(), Event{ID: "$x", RoomID: "!room", Sender: alice}, time.Second, false)
		require.ErrorAs(t, err, &limit)
		require.Equal(t, time.Second, limit.RetryAfter, "the limit of expiring events")
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
		w.wantFinal(delayID, func(f Final) bool { return strings.Contains(string(f.Error), "too many running timers") })
		time.Sleep(time.Minute)
		w.wantSent()
		w.wantClosings(e)
	})
}

// Tokens and delay IDs are separate: neither works in place of the other.
func TestDelayIDsAreNoTokens(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		delayID, token := w.schedule(leave("key"), "left", time.Hour), w.Token(e.ID)
		require.False(t, w.known(HashToken(delayID)))
		require.ErrorIs(t, w.Refresh(t.Context(), HashToken(delayID)), ErrNotFound)
		require.ErrorIs(t, w.End(t.Context(), HashToken(delayID)), ErrNotFound)
		require.False(t, w.knownDelayed(token))
		for _, act := range []func(context.Context, string, string) error{w.RestartDelayed, w.SendDelayed, w.CancelDelayed} {
			for _, owner := range []string{"", alice} {
				require.ErrorIs(t, act(t.Context(), token, owner), ErrNotFound)
			}
		}
		_, err := w.DelayedEvent(t.Context(), token, alice)
		require.ErrorIs(t, err, ErrNotFound)
		require.True(t, w.known(w.hash(e)))
		require.True(t, w.knownDelayed(delayID))
		w.wantSent()
		w.wantClosings()
	})
}

// The owner can see the delay ID as soon as anybody can see the event, and in every later process.
func TestDelayIDsOfSentEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		const eventID = "$delayed1"
		check := func(want bool) {
			t.Helper()
			require.Equal(t, want, w.AnySent())
			require.Equal(t, want, w.HasSent(alice))
			require.False(t, w.HasSent(bob))
			got, err := w.DelayIDs(t.Context(), alice, []string{"$x", eventID})
			require.NoError(t, err)
			if want {
				require.Equal(t, map[string]string{eventID: delayID}, got)
			} else {
				require.Empty(t, got)
			}
			got, err = w.DelayIDs(t.Context(), bob, []string{eventID})
			require.NoError(t, err)
			require.Empty(t, got)
		}
		check(false)
		w.roomserver.set(hooks{afterClaim: func(Event) error { check(true); return errFault }})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		check(true)
		require.Equal(t, eventID, w.final(delayID).EventID, "being sent")
		wantFinalised(t, w.RestartDelayed(t.Context(), delayID, alice), Final.Sent)
		w.loaded = func() { w.store.set(false, failing("read")) }
		w.restart(time.Second)
		w.loaded = nil
		check(true)
		w.roomserver.set(hooks{})
		w.store.set(false, failing("finalise"))
		time.Sleep(time.Minute)
		w.wantSent("left")
		check(true)
		require.Equal(t, eventID, w.final(delayID).EventID, "in the room")
		wantFinalised(t, w.RestartDelayed(t.Context(), delayID, alice), Final.Sent)
		w.restart(time.Second)
		check(true)
		w.store.set(false, nil)
		time.Sleep(time.Minute)
		check(true)
		require.Empty(t, w.inFlight)
		w.restart(time.Second)
		check(true)
	})
	// A claim that was written although it failed is found at the next attempt.
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.schedule(leave("key"), "left", 10*time.Second)
		w.store.set(true, failing("claim"))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.store.set(false, nil)
		require.False(t, w.AnySent())
		w.roomserver.set(hooks{afterClaim: func(Event) error {
			require.True(t, w.HasSent(alice))
			return nil
		}})
		time.Sleep(firstPause)
		w.wantSent("left")
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		require.NoError(t, w.CancelDelayed(t.Context(), w.schedule(leave("key"), "left", time.Hour), alice))
		w.restart(0)
		require.False(t, w.AnySent(), "cancelled")
		require.False(t, w.HasSent(alice))
	})
}

func TestDelayedEventsAreListedInOrder(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		const rest = 300 * time.Microsecond
		time.Sleep(rest) // the deadlines are not whole milliseconds
		third, first := w.schedule(leave("key"), "third", 30*time.Second), w.schedule(later("!a"), "first", 10*time.Second)
		second, gone := w.schedule(later("!b"), "second", 20*time.Second), w.schedule(later("!b"), "gone", 5*time.Second)
		w.message("!room", 15*time.Second)
		want := func(delayIDs ...string) []DelayedEvent {
			t.Helper()
			events := w.list(alice, "")
			var got []string
			for _, e := range events {
				require.Nil(t, e.Final)
				got = append(got, e.DelayID)
			}
			require.Equal(t, delayIDs, got)
			return events
		}
		want(gone, first, second, third)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		want(first, second, third)
		require.NoError(t, w.RestartDelayed(t.Context(), first, alice))
		time.Sleep(time.Second)
		w.restart(time.Second)
		time.Sleep(rest)
		require.NoError(t, w.RestartDelayed(t.Context(), first, alice))
		restarted := w.stored(time.Now())
		events := want(first, second, third)
		require.Equal(t, restarted, events[0].ScheduledAt())
		require.Equal(t, "first", string(events[0].Timer.Delayed.Content))
		require.Equal(t, "!a", events[0].Timer.Event.RoomID)
		require.Equal(t, 10*time.Second, events[0].Timer.Duration)
		one, err := w.DelayedEvent(t.Context(), first, alice)
		require.NoError(t, err)
		one.Place = events[0].Place
		require.Equal(t, events[0], one)
		_, err = w.DelayedEvent(t.Context(), first, bob)
		require.ErrorIs(t, err, ErrNotFound)
		_, err = w.DelayedEvent(t.Context(), gone, bob)
		require.ErrorIs(t, err, ErrNotFound)
		require.Empty(t, w.list(bob, ""))
		// Listing after each event returns those that follow it.
		for i, e := range events {
			require.Equal(t, events[i+1:], w.list(alice, e.Place))
		}
		require.Empty(t, w.list(alice, "x"))
	})
}

// Events that are due in the same millisecond have different places, and only as many rows are read as the caller wants.
func TestPlacesInTheList(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		for range 20 {
			w.schedule(later("!a"), "same", 10*time.Second)
		}
		all, from := w.list(alice, ""), ""
		require.Len(t, all, 20)
		for i := range all {
			for e, err := range w.DelayedEvents(t.Context(), alice, from) {
				require.NoError(t, err)
				require.Equal(t, all[i], e)
				from = e.Place
				break
			}
		}
		require.Empty(t, w.list(alice, from))
		w.store.set(false, failing("read"))
		n := 0
		for _, err := range w.DelayedEvents(t.Context(), alice, "") {
			require.Error(t, err)
			n++
		}
		require.Equal(t, 1, n)
		w.store.set(false, nil)
	})
}

// An application service's delayed event that expires once it is sent is exempt from the limit of running events, also after a restart.
func TestExemptDelayedEventThatExpires(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 1}, func(t *testing.T, w *world) {
		w.message("!room", time.Hour)
		for _, exempt := range []bool{true, false} {
			d := Delayed{Content: []byte("here"), Expires: time.Hour}
			_, err := w.Schedule(t.Context(), later("!room"), d, 10*time.Second, exempt)
			require.NoError(t, err)
		}
		w.restart(0)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.wantSent("here")
	})
}

func TestFinalisedEventsAreForgotten(t *testing.T) {
	inWorld(t, Config{KeepFinalised: 24 * time.Hour, MaxFinalisedPerUser: 2}, func(t *testing.T, w *world) {
		delayID := w.schedule(requested(leave("key"), 1), "left", 30*time.Minute)
		time.Sleep(30 * time.Minute)
		w.wantSent("left")
		time.Sleep(24 * time.Hour)
		w.wantFinal(delayID, Final.Sent)
		time.Sleep(pruneInterval)
		synctest.Wait()
		_, err := w.DelayedEvent(t.Context(), delayID, alice)
		require.ErrorIs(t, err, ErrNotFound)
		require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, alice), ErrNotFound)
		again := w.schedule(requested(leave("key"), 1), "left", time.Hour)
		require.NotEqual(t, delayID, again)

		var ids []string
		for range 3 {
			ids = append(ids, w.schedule(later("!room"), "x", time.Second))
			time.Sleep(time.Second)
			synctest.Wait()
		}
		_, err = w.DelayedEvent(t.Context(), ids[0], alice)
		require.ErrorIs(t, err, ErrNotFound, "more events than are kept")
		w.wantFinal(ids[1], Final.Sent)
		w.wantFinal(ids[2], Final.Sent)
		require.Nil(t, w.final(again))
	})
}

// Sending, cancelling, restarting and the deadline coincide: one wins, and all callers get the same result.
func TestEndsOfADelayedEventExcludeEachOther(t *testing.T) {
	for round := range 60 {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			if round%3 > 0 {
				w.roomserver.set(hooks{beforeClaim: takes(time.Duration(round%4) * time.Millisecond), afterClaim: takes(time.Millisecond)})
			}
			delayID := w.schedule(leave("key"), "left", 10*time.Second)
			time.Sleep(10*time.Second + time.Duration(round%5-2)*time.Millisecond)
			var (
				wg                         sync.WaitGroup
				sent, cancelled, restarted error
			)
			wg.Go(func() { restarted = w.RestartDelayed(t.Context(), delayID, alice) })
			wg.Go(func() {
				time.Sleep(time.Duration(round%7) * time.Millisecond / 2)
				cancelled = w.CancelDelayed(t.Context(), delayID, alice)
			})
			if round%2 == 0 {
				wg.Go(func() { sent = w.SendDelayed(t.Context(), delayID, alice) })
			} else {
				sent = &FinalisedError{}
			}
			wg.Wait()
			time.Sleep(time.Minute)
			synctest.Wait()
			f := w.final(delayID)
			require.NotNil(t, f)
			require.Equal(t, f.Cancelled(), cancelled == nil)
			require.False(t, sent == nil && cancelled == nil)
			for _, err := range []error{sent, cancelled, restarted} {
				if err != nil {
					wantFinalised(t, err, func(other Final) bool {
						return round%2 == 1 && err == sent || other.Sent() == f.Sent() && other.EventID == f.EventID
					})
				}
			}
			if f.Sent() {
				w.wantSent("left")
			} else {
				w.wantSent()
			}
			require.True(t, w.index.Empty())
		})
	}
}
