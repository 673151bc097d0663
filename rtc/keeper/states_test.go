package keeper

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// Each row of the table of transitions in the package comment.

func TestTransitions(t *testing.T) {
	for name, test := range map[string]func(t *testing.T, w *world){
		"a new one waits, and is restarted at once": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			w.wantPhase(m, waiting)
			w.wantRow(m, expiration.DelegationWaiting)
			w.wantRunning(m, 0)
			require.Equal(t, 1, w.asked())
		},
		"a waiting one is looked at with growing pauses": func(t *testing.T, w *world) {
			w.waiting(leaveOf(1), 3*time.Hour)
			for _, pause := range []time.Duration{time.Second, time.Second, time.Second, 1500 * time.Millisecond, 2250 * time.Millisecond} {
				before := w.asked()
				time.Sleep(pause - time.Millisecond)
				require.Equal(t, before, w.asked())
				time.Sleep(time.Millisecond)
				require.Equal(t, before+1, w.asked())
			}
			time.Sleep(10 * time.Minute)
			before := w.asked()
			time.Sleep(10 * time.Minute)
			require.Equal(t, before+10, w.asked())
		},
		"a waiting one that is there is connected": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			time.Sleep(5 * time.Minute)
			w.enters(m)
			w.wantPhase(m, connected)
			w.wantRunning(m, 0)
			w.wantRow(m, expiration.DelegationConnected)
			row, _ := w.timers.rowOf(m.timer)
			require.Equal(t, w.sfu.sid(m.Room), row.RoomSID)
			require.WithinDuration(t, time.Now(), row.Seen, time.Millisecond)
		},
		"a waiting one that is only joining waits": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			w.sfu.enter(m.Participant, livekit.Joining)
			time.Sleep(10 * time.Second)
			w.wantPhase(m, waiting)
			w.sfu.enter(m.Participant, livekit.Joined)
			time.Sleep(10 * time.Second)
			w.wantPhase(m, connected)
		},
		"a waiting one whose connection was aborted waits": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			w.hint(m, livekit.ParticipantAborted, livekit.SignalClose)
			time.Sleep(time.Minute)
			w.wantPhase(m, waiting)
		},
		"a leave waits for an hour at most": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), 3*time.Hour)
			time.Sleep(time.Hour - time.Millisecond)
			w.wantPhase(m, waiting)
			time.Sleep(time.Millisecond)
			w.wantPhase(m, over)
			w.wantEnded(m, "finished", 0)
			require.Equal(t, 1, w.restarts(m))
		},
		"a leave waits for its delay at most, and is restarted no more": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), 10*time.Minute)
			time.Sleep(10*time.Minute - time.Millisecond)
			w.wantPhase(m, waiting)
			require.Equal(t, 1, w.restarts(m))
			time.Sleep(time.Millisecond)
			w.wantPhase(m, over)
			require.NotEmpty(t, w.timers.of(m.timer).ended)
		},
		"a leave does not end while LiveKit does not answer": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), 3*time.Hour)
			w.silence(errFault)
			time.Sleep(2 * time.Hour)
			w.wantPhase(m, waiting)
			w.silence(nil)
			time.Sleep(time.Minute)
			w.wantPhase(m, over)
		},
		"a waiting token is kept alive for an hour, and then expires": func(t *testing.T, w *world) {
			m := w.waiting(tokenOf(1), time.Minute)
			time.Sleep(time.Hour - time.Second)
			w.wantPhase(m, waiting)
			w.wantRunning(m, 29*time.Second)
			time.Sleep(2 * time.Minute)
			w.wantEnded(m, "expired", 89*time.Second)
			w.wantPhase(m, over)
		},
		"a connected one is restarted at half of its delay": func(t *testing.T, w *world) {
			for i, delay := range []time.Duration{2 * time.Second, 10 * time.Second, time.Minute, time.Hour} {
				m := w.connected(leaveOf(i), delay)
				for range 20 {
					time.Sleep(delay / 2)
					w.wantRunning(m, 0)
				}
				require.Equal(t, 22, w.restarts(m))
				w.timers.end(m.timer)
			}
		},
		"a connected one is looked for every 15 seconds": func(t *testing.T, w *world) {
			w.connected(leaveOf(1), time.Hour)
			w.connected(leaveOf(2), 2*time.Hour) // in the same room: one look for both
			time.Sleep(time.Second)
			before := w.asked()
			time.Sleep(10 * time.Minute)
			require.Equal(t, before+40, w.asked())
		},
		"a connected one with a short delay is looked for more often": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), 20*time.Second)
			w.sfu.exit(m.Participant)
			time.Sleep(5*time.Second + unheard)
			w.wantEnded(m, "finished", 0)
		},
		"a connected one that comes back under the same identity stays": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.sfu.enter(m.Participant, livekit.Active)
			w.hint(m, livekit.ParticipantLeft, "DUPLICATE_IDENTITY")
			time.Sleep(time.Minute)
			w.wantPhase(m, connected)
			require.Equal(t, 2, w.restarts(m))
		},
		"a connected one that joins anew is not gone": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.sfu.enter(m.Participant, livekit.Joining)
			w.hint(m, livekit.ParticipantLeft, "CONNECTION_TIMEOUT")
			time.Sleep(time.Minute)
			w.wantPhase(m, connected)
		},
		"a connected one that is no longer there is gone at once": func(t *testing.T, w *world) {
			for i, m := range []member{leaveOf(1), tokenOf(2)} {
				w.connected(m, time.Hour)
				w.connected(leaveOf(10+i), time.Hour)
				time.Sleep(10 * time.Minute)
				w.crashes(m)
				w.wantPhase(m, missing)
				time.Sleep(confirmed)
				w.wantPhase(m, over)
				w.wantEnded(m, "finished", 0)
				w.wantPhase(leaveOf(10+i), connected)
				require.Equal(t, 2, w.restarts(m))
			}
		},
		"a connected one that leaves with a lost webhook is gone within 15 seconds": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(10 * time.Minute)
			w.sfu.exit(m.Participant)
			time.Sleep(lookInterval + confirmed)
			w.wantPhase(m, over)
		},
		"a connected one whose room was made anew is missing, and then gone": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute)
			sid := w.sfu.sid(m.Room)
			w.restartLiveKit(0)
			time.Sleep(lookInterval)
			w.wantPhase(m, missing)
			require.NotEmpty(t, w.sfu.sid(m.Room), "the room is made, because nobody can connect without it")
			require.NotEqual(t, sid, w.sfu.sid(m.Room))
			w.wantRow(m, expiration.DelegationConnected)
			time.Sleep(grace)
			w.wantPhase(m, over)
			w.wantEnded(m, "finished", time.Since(w.timers.of(m.timer).endedAt))
			require.Equal(t, 3, w.restarts(m), "once more when it was missed")
		},
		"a missing one that comes back is connected, in the new room": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.restartLiveKit(0)
			time.Sleep(lookInterval)
			w.wantPhase(m, missing)
			time.Sleep(grace - time.Second)
			require.True(t, w.sfu.enter(m.Participant, livekit.Active))
			time.Sleep(time.Second)
			w.wantPhase(m, connected)
			row, _ := w.timers.rowOf(m.timer)
			require.Equal(t, w.sfu.sid(m.Room), row.RoomSID)
			w.crashes(m) // and counts from now on as before
			time.Sleep(confirmed)
			w.wantEnded(m, "finished", 0)
		},
		"a missing one that is joining is not gone": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.restartLiveKit(0)
			time.Sleep(lookInterval)
			w.wantPhase(m, missing)
			require.True(t, w.sfu.enter(m.Participant, livekit.Joining))
			time.Sleep(2 * grace)
			w.wantPhase(m, missing)
			w.sfu.exit(m.Participant)
			time.Sleep(time.Second)
			w.wantEnded(m, "finished", 0)
		},
		"one whom a webhook excuses is missing for 20 seconds": func(t *testing.T, w *world) {
			for i, reason := range returning {
				m := w.connected(leaveOf(i), time.Hour)
				w.sfu.exit(m.Participant)
				w.hint(m, livekit.ParticipantLeft, reason)
				time.Sleep(grace - time.Millisecond)
				w.wantPhase(m, missing)
				time.Sleep(time.Millisecond)
				w.wantEnded(m, "finished", 0)
			}
		},
		"a webhook may come after it was missed": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.sfu.exit(m.Participant)
			time.Sleep(lookInterval + confirmed/2)
			w.wantPhase(m, missing)
			w.hint(m, livekit.ParticipantLeft, livekit.ServerShutdown)
			time.Sleep(grace - confirmed)
			w.wantPhase(m, missing)
			for range 100 { // more of them change nothing
				w.hint(m, livekit.ParticipantLeft, livekit.ServerShutdown)
			}
			time.Sleep(confirmed)
			w.wantPhase(m, over)
		},
		"an older session that closes late may hide a newer one for a moment": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.hint(m, livekit.ParticipantJoined, "")
			w.sfu.exit(m.Participant)
			w.hint(m, livekit.ParticipantLeft, "CONNECTION_TIMEOUT")
			time.Sleep(time.Second)
			w.wantPhase(m, missing)
			w.sfu.enter(m.Participant, livekit.Active)
			time.Sleep(time.Second)
			w.wantPhase(m, connected)
		},
		"a connected or missing one is silent if LiveKit does not answer": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(10*time.Minute + time.Second)
			require.Empty(t, w.Warnings())
			w.silence(errFault)
			time.Sleep(lookInterval)
			w.wantPhase(m, silent)
			w.wantRunning(m, time.Second) // when the silence was noticed
			require.Len(t, w.Warnings(), 1)
			time.Sleep(30 * time.Minute)
			w.wantRunning(m, 30*time.Minute+time.Second) // no more
			w.silence(nil)
			time.Sleep(silentPause)
			w.wantPhase(m, connected)
			require.Empty(t, w.Warnings())

			w.restartLiveKit(0)
			time.Sleep(lookInterval)
			w.wantPhase(m, missing)
			w.silence(errFault)
			time.Sleep(time.Second)
			w.wantPhase(m, silent)
		},
		"a silent one that is not there has 20 seconds": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.silence(errFault)
			time.Sleep(10 * time.Minute)
			w.sfu.exit(m.Participant)
			w.silence(nil)
			time.Sleep(silentPause)
			w.wantPhase(m, missing)
			time.Sleep(grace)
			w.wantPhase(m, over)
		},
		"a silent one that is joining has 20 seconds": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.silence(errFault)
			time.Sleep(10 * time.Minute)
			w.silence(nil)
			w.sfu.enter(m.Participant, livekit.Joining)
			time.Sleep(silentPause)
			w.wantPhase(m, missing)
		},
		"a silent one is left to run out": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), 10*time.Minute)
			time.Sleep(time.Hour + time.Second)
			w.silence(errFault)
			time.Sleep(lookInterval)
			w.wantPhase(m, silent)
			require.Len(t, w.Warnings(), 1)
			time.Sleep(10 * time.Minute)
			w.wantEnded(m, "expired", time.Second) // ten minutes after the silence was noticed
			time.Sleep(checkInterval)
			w.wantPhase(m, over)
			require.Empty(t, w.Warnings(), "nobody has to ask LiveKit any more")
		},
		"a gone one is noted before it ends": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.failing(errFault, "note")
			w.crashes(m)
			time.Sleep(time.Minute)
			w.wantPhase(m, gone)
			require.Empty(t, w.timers.of(m.timer).ended)
			w.failing(nil)
			time.Sleep(longestRetry)
			w.wantPhase(m, over)
			require.Equal(t, "finished", w.timers.of(m.timer).ended)
		},
		"a gone one is ended again and again, and never restarted": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.failing(&expiration.RefusedError{Code: 403}, "finish")
			time.Sleep(time.Minute)
			w.crashes(m)
			time.Sleep(10 * time.Minute)
			w.wantPhase(m, gone)
			w.enters(m) // too late
			time.Sleep(10 * time.Minute)
			w.wantPhase(m, gone)
			require.Equal(t, 2, w.restarts(m))
			require.ErrorIs(t, w.delegate(m), expiration.ErrNotFound)
			time.Sleep(40 * time.Minute)
			w.failing(nil)
			time.Sleep(longestRetry)
			w.wantPhase(m, over)
			require.Equal(t, "expired", w.timers.of(m.timer).ended)
		},
		"one whose timer has ended is over": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			w.timers.end(m.timer)
			time.Sleep(waitingCheck)
			w.wantPhase(m, over)

			m = w.connected(leaveOf(2), time.Hour)
			w.timers.end(m.timer)
			time.Sleep(checkInterval)
			w.wantPhase(m, over)

			for i, err := range []error{expiration.ErrNotFound, &expiration.FinalisedError{}, &expiration.DropError{Reason: expiration.Forbidden}} {
				m = w.connected(leaveOf(10+i), time.Hour)
				time.Sleep(time.Minute)
				w.failing(err, "finish")
				w.crashes(m)
				time.Sleep(confirmed)
				w.wantPhase(m, over)
			}
		},
		"of one member the newest counts": func(t *testing.T, w *world) {
			first := w.connected(leaveOf(1), time.Hour)
			second := leaveOf(2)
			second.Participant = first.Participant
			w.waiting(second, time.Hour)
			w.wantPhase(first, over)
			w.wantRow(first, "")
			w.wantPhase(second, connected)
			w.crashes(second)
			time.Sleep(confirmed)
			w.wantEnded(second, "finished", 0)
			require.Equal(t, "cancelled", w.timers.of(first.timer).ended, "it would throw out the participant later")
			require.Equal(t, 2, w.restarts(first))
		},
		"of one token the newest counts": func(t *testing.T, w *world) {
			m := w.connected(tokenOf(1), time.Hour)
			other := m
			other.Identity = "another"
			require.NoError(t, w.delegate(other))
			w.wantPhase(m, waiting)
			w.crashes(m)
			time.Sleep(time.Minute)
			w.wantPhase(m, waiting)
			row, _ := w.timers.rowOf(m.timer)
			require.Equal(t, "another", row.Identity)
		},
		"the same again changes nothing": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			require.NoError(t, w.delegate(m))
			w.wantPhase(m, connected)
			w.wantRow(m, expiration.DelegationConnected)
		},
	} {
		t.Run(name, func(t *testing.T) { inWorld(t, test) })
	}
}

// The transitions at a start.
func TestTransitionsAtAStart(t *testing.T) {
	for name, test := range map[string]func(t *testing.T, w *world){
		"waiting": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			time.Sleep(40 * time.Minute)
			w.restart(time.Second)
			w.wantPhase(m, waiting)
			w.wantRunning(m, 40*time.Minute+time.Second)
			time.Sleep(20*time.Minute - time.Second)
			w.wantPhase(m, over) // the hour counts from when it was accepted
			require.NotEmpty(t, w.timers.of(m.timer).ended)
		},
		"waiting, and connected since": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			w.kill()
			w.sfu.enter(m.Participant, livekit.Active)
			time.Sleep(time.Minute)
			w.start()
			w.wantPhase(m, connected)
			w.wantRunning(m, 0)
		},
		"waiting, a token": func(t *testing.T, w *world) {
			m := w.waiting(tokenOf(1), time.Minute)
			time.Sleep(10*time.Minute + time.Second)
			w.restart(time.Second)
			w.wantPhase(m, waiting)
			w.wantRunning(m, 0)
			time.Sleep(50*time.Minute + 2*time.Minute)
			require.Equal(t, "expired", w.timers.of(m.timer).ended)
		},
		"waiting, a token, for more than an hour": func(t *testing.T, w *world) {
			m := w.waiting(tokenOf(1), 3*time.Hour)
			time.Sleep(70 * time.Minute)
			w.restart(time.Second)
			w.wantPhase(m, waiting)
			w.wantRunning(m, 70*time.Minute+time.Second)
			w.sfu.enter(m.Participant, livekit.Active) // its event still runs
			time.Sleep(waitingPause)
			w.wantPhase(m, connected)
		},
		"connected": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute)
			w.restart(time.Second)
			w.wantPhase(m, connected)
			w.wantRunning(m, 0)
		},
		"connected, and gone since": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute)
			w.kill()
			w.sfu.exit(m.Participant)
			time.Sleep(time.Second)
			w.start()
			w.wantPhase(m, missing)
			time.Sleep(unheard)
			w.wantEnded(m, "finished", 0)
			require.Equal(t, 2, w.restarts(m))
		},
		"connected, and LiveKit was restarted too": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.kill()
			w.restartLiveKit(0)
			w.start()
			w.wantPhase(m, missing)
			time.Sleep(grace)
			w.wantEnded(m, "finished", 0)
		},
		"connected, and LiveKit does not answer": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), 5*time.Minute)
			time.Sleep(3 * time.Minute)
			w.kill()
			w.silence(errFault)
			time.Sleep(time.Second)
			for range 10 { // processes that see nobody keep nobody alive
				w.start()
				w.wantPhase(m, silent)
				time.Sleep(time.Second)
				w.kill()
			}
			require.Equal(t, 3, w.restarts(m))
			w.start()
			time.Sleep(5 * time.Minute)
			require.Equal(t, "expired", w.timers.of(m.timer).ended)
		},
		"gone": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute)
			w.failing(errFault, "finish")
			w.crashes(m)
			time.Sleep(time.Second)
			w.wantRow(m, expiration.DelegationGone)
			w.kill()
			w.failing(nil)
			w.sfu.enter(m.Participant, livekit.Active) // too late
			w.start()
			w.wantEnded(m, "finished", 0)
			w.wantPhase(m, over)
			require.Equal(t, 2, w.restarts(m))
		},
	} {
		t.Run(name, func(t *testing.T) { inWorld(t, test) })
	}
}

// A transition that the table does not have is refused.
func TestRefusedTransitions(t *testing.T) {
	now := time.Now()
	for from := waiting; from <= over; from++ {
		for to := waiting; to <= over; to++ {
			d := accept(expiration.Delegation{}, now)
			d.phase = from
			changed := d.become(to, now.Add(time.Second))
			require.Equal(t, changed, d.phase == to && from != to, "%s to %s", from, to)
			if from == gone {
				require.Equal(t, to == over, changed)
			}
		}
	}
	d := accept(expiration.Delegation{}, now)
	d.lose(now)
	d.there(livekit.Active, "RM", now, now)
	d.unanswered(now)
	d.resize(time.Minute, now)
	require.Equal(t, gone, d.phase)
	require.True(t, d.due[keep].IsZero())
}
