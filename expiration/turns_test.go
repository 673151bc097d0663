package expiration

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

// The attempts in one room: their order, and how far the next one may go before the previous one is over.

// While the roomserver has a room's event, exactly one further event is built and claimed. The roomserver gets it after the first.
func TestTurnsOverlap(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(600 * time.Millisecond), afterClaim: takes(time.Second)})
		start := time.Now()
		var events []Event
		for i := range 4 {
			events = append(events, w.message("!room", 10*time.Second+time.Duration(i)*time.Millisecond))
		}
		time.Sleep(11300 * time.Millisecond)
		synctest.Wait()
		require.Equal(t, 2, w.roomserver.attempts())
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(events[1])), ErrNotFound, "claimed while the first is with the roomserver")
		require.NoError(t, w.Refresh(t.Context(), w.hash(events[2])))
		w.wantClosings()
		time.Sleep(10 * time.Second)
		w.wantClosings(events[0], events[1], events[3])
		time.Sleep(10 * time.Second)
		w.wantClosings(events[0], events[1], events[3], events[2])
		var at []time.Duration
		for _, c := range w.roomserver.closings() {
			at = append(at, c.at.Sub(start))
		}
		// The fourth turn begins after the third turned out to be refreshed and the second is over.
		require.Equal(t, []time.Duration{
			11600 * time.Millisecond, 12600 * time.Millisecond, 14200 * time.Millisecond, 22902 * time.Millisecond,
		}, at)
	})
}

// If early events fork the event graph, only some turns are early, because each merge makes the roomserver read all state. Events that
// users send meanwhile make no difference.
func TestTurnsSeldomOverlap(t *testing.T) {
	for _, users := range []bool{false, true} {
		inWorld(t, Config{MaxRunningPerUser: 200}, func(t *testing.T, w *world) {
			w.earlyEvery = lanes.EarlyEvery
			w.restart(0)
			begin := takes(600 * time.Millisecond)
			w.roomserver.set(hooks{afterClaim: takes(time.Second), beforeClaim: func(e Event) error {
				if users {
					w.roomserver.send(Event{ID: "$user's before " + e.ID, RoomID: e.RoomID})
				}
				return begin(e)
			}})
			const n = 2*lanes.EarlyEvery*lanes.EarlyEvery + 1
			for i := range n {
				w.message("!room", 10*time.Second+time.Duration(i)*time.Millisecond)
			}
			time.Sleep(5 * time.Minute)
			closings := w.roomserver.closings()
			require.Len(t, closings, n)
			var early []int
			for i := 1; i < n; i++ {
				took := closings[i].at.Sub(closings[i-1].at)
				if took != 1600*time.Millisecond {
					require.Equal(t, time.Second, took, i)
					early = append(early, i)
				}
			}
			require.Equal(t, []int{1, 9, 17, 25, 33, 41, 49, 57, 65}, early[:9], "one in eight while many wait")
			require.Equal(t, []int{n - 5, n - 1}, early[len(early)-2:], "one in four at the end")
		})
	}
}

// If early events do not fork the event graph, because the previous event is in the room by then, every turn is early.
func TestTurnsBuiltUponOneAnother(t *testing.T) {
	const n = 2 * lanes.EarlyEvery * lanes.EarlyEvery
	for name, add := range map[string]func(w *world, in time.Duration){
		"closing events": func(w *world, in time.Duration) { w.message("!room", in) },
		"delayed state": func(w *world, in time.Duration) {
			key := in.String()
			w.schedule(Event{RoomID: "!room", Type: "m.call.member", StateKey: &key, Sender: alice}, key, in)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, Config{MaxRunningPerUser: n, MaxScheduledPerUser: n}, func(t *testing.T, w *world) {
				w.earlyEvery = lanes.EarlyEvery
				w.restart(0)
				w.roomserver.set(hooks{beforeClaim: takes(1600 * time.Millisecond), afterClaim: takes(time.Second)})
				start := time.Now()
				for i := range n {
					add(w, 10*time.Second+time.Duration(i)*time.Millisecond)
				}
				time.Sleep(10 * time.Minute)
				var at []time.Duration
				for _, c := range w.roomserver.closings() {
					at = append(at, c.at.Sub(start))
				}
				for _, e := range w.roomserver.sent() {
					at = append(at, e.at.Sub(start))
				}
				require.Len(t, at, n)
				for i, at := range at {
					require.Equal(t, 12600*time.Millisecond+time.Duration(i)*1600*time.Millisecond, at, i)
				}
			})
		})
	}
}

// Delayed state and closing events take turns in the same lane. Delayed messages also do, but overlap nothing: each is built when the
// event before it is in the room, and the event after it is built when it is itself in the room.
func TestTurnsOfDelayedEvents(t *testing.T) {
	for _, test := range []struct {
		state bool
		each  time.Duration // how long each event takes, but for the first
	}{{true, time.Second}, {false, 1600 * time.Millisecond}} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			w.roomserver.set(hooks{beforeClaim: takes(600 * time.Millisecond), afterClaim: takes(time.Second)})
			start := time.Now()
			first := w.message("!room", 10*time.Second)
			for i := range 2 {
				e, name := Event{RoomID: "!room", Type: "m.call.member", Sender: alice}, fmt.Sprint(i)
				if test.state {
					e.StateKey = &name
				}
				w.schedule(e, name, 10*time.Second+time.Duration(i+1)*time.Millisecond)
			}
			last := w.message("!room", 10*time.Second+3*time.Millisecond)
			time.Sleep(time.Minute)
			w.wantClosings(first, last)
			w.wantSent("0", "1")
			const begin = 11600 * time.Millisecond
			closings, sent := w.roomserver.closings(), w.roomserver.sent()
			for i, at := range []time.Time{closings[0].at, sent[0].at, sent[1].at, closings[1].at} {
				require.Equal(t, begin+time.Duration(i)*test.each, at.Sub(start), i)
			}
		})
	}
}

// A timer that becomes due while its room's queue is empty, but an event is with the roomserver, is sent after that event.
func TestTurnOfWhatComesLater(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(600 * time.Millisecond), afterClaim: takes(time.Second)})
		start := time.Now()
		first, second := w.message("!room", 10*time.Second), w.message("!room", 10*time.Second+time.Millisecond)
		third := w.message("!room", 11700*time.Millisecond) // due while the first is in the room, and the second with the roomserver
		time.Sleep(time.Minute)
		w.wantClosings(first, second, third)
		require.Equal(t, 13600*time.Millisecond, w.roomserver.closings()[2].at.Sub(start))
	})
}

// An event that is given to the roomserver again also waits for its turn, and the next one waits for it.
func TestTurnOfAnotherAttempt(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: fails})
		first := w.message("!room", 10*time.Second)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.roomserver.set(hooks{afterClaim: takes(time.Second)})
		second := w.message("!room", firstPause-time.Millisecond)
		third := w.message("!room", firstPause+time.Second) // due after the retry has begun
		time.Sleep(time.Minute)
		w.wantClosings(second, first, third)
		closings := w.roomserver.closings()
		require.Equal(t, time.Second, closings[1].at.Sub(closings[0].at))
		require.Equal(t, closings[1].at, closings[2].built)
	})
}

// An event that may influence whether others are allowed is in the room before those are built.
func TestTurnsOfWhatDecides(t *testing.T) {
	for _, test := range []struct {
		eventType string
		key       *string
		begins    time.Duration // after the first is due
	}{
		{"m.room.power_levels", new(string), 1600 * time.Millisecond},
		{"m.room.redaction", nil, 1600 * time.Millisecond},
		{"m.room.message", nil, 600 * time.Millisecond},
		{"m.call.member", new(string), 600 * time.Millisecond},
	} {
		t.Run(test.eventType, func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				w.roomserver.set(hooks{beforeClaim: takes(600 * time.Millisecond), afterClaim: takes(time.Second)})
				start := time.Now()
				w.send(Event{ID: "$first", RoomID: "!room", Type: test.eventType, StateKey: test.key, Sender: "@alice:example.org"}, 10*time.Second)
				second := w.message("!room", 10*time.Second+time.Millisecond)
				time.Sleep(time.Minute)
				w.wantClosings(Event{ID: "$first"}, second)
				require.Equal(t, 10*time.Second+test.begins, w.roomserver.closings()[1].built.Sub(start))
			})
		})
	}
}

// An event that waits for its turn when the engine stops is sent by the next process as it was claimed.
func TestStoppedBeforeItsTurn(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		first := true
		w.roomserver.set(hooks{afterClaim: func(Event) error {
			if first {
				first = false
				time.Sleep(time.Hour)
				return errFault
			}
			return nil
		}})
		a, b := w.message("!room", 10*time.Second), w.message("!room", 11*time.Second)
		time.Sleep(12 * time.Second)
		synctest.Wait()
		require.Equal(t, 2, w.roomserver.attempts())
		stopping := time.Now()
		go w.Stop()
		time.Sleep(stopPatience)
		require.Less(t, time.Since(stopping), time.Minute)
		w.wantClosings()
		time.Sleep(time.Hour)
		w.start(w.cfg)
		w.wantClosings(a, b)
		require.Equal(t, 2, w.roomserver.attempts(), "no event is built again")
	})
}
