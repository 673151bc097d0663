package roomserver

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/inputqueue"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/fakequeue"
)

// builder is a roomserver that notes the contents of the queue when it is asked to build an event.
type builder struct {
	expiration.Roomserver
	d     *fakequeue.Roomserver
	built int
	upon  inputqueue.Backlog
}

func (b *builder) build() {
	b.built++
	b.upon, _ = b.d.Backlog(context.Background(), testRoom)
}

func (b *builder) Close(
	context.Context, expiration.Event, expiration.Outcome, time.Time, bool, func(context.Context, expiration.SignedEvent) error,
) error {
	b.build()
	return nil
}

func (b *builder) Send(context.Context, expiration.Timer, expiration.Outcome, func(context.Context, expiration.Built) error) (string, error) {
	b.build()
	return "$sent", nil
}

// stream is an output stream: the number of its last message, and the number up to which the timers have acknowledged it.
type stream struct{ last, acknowledged uint64 }

func (s *stream) written(context.Context) (uint64, error) { return s.last, nil }
func (s *stream) heard(context.Context) (uint64, error)   { return s.acknowledged, nil }

// settleTest has a room with a timer that is due.
type settleTest struct {
	*fakequeue.Roomserver
	*builder
	*stream
	intake *Intake
	quiet  *dendritefix.QuietRooms
	r      expiration.Roomserver
}

const testRoom = "!room:example.org"

func testSettling(t *testing.T, test func(t *testing.T, s *settleTest)) {
	synctest.Test(t, func(t *testing.T) {
		r := fakequeue.New(10 * time.Millisecond)
		s := &settleTest{Roomserver: r, builder: &builder{d: r}, stream: &stream{}}
		s.intake = NewIntake(r, r, s.stream)
		s.quiet = dendritefix.NewQuietRooms(s.intake, r)
		s.r = s.intake.Settling(s.builder)
		ctx, cancel := context.WithCancel(t.Context())
		s.quiet.Start(ctx)
		t.Cleanup(func() {
			cancel()
			s.quiet.Stop()
			r.Finish()
		})
		test(t, s)
	})
}

// comes delivers an event of another server to the room.
func (s *settleTest) comes(t *testing.T) {
	s.quiet.InputRoomEvents(t.Context(), &api.InputRoomEventsRequest{
		Asynchronous: true, InputRoomEvents: []api.InputRoomEvent{{Kind: api.KindNew, Event: newEvent(t, "", `{}`)}},
	}, &api.InputRoomEventsResponse{})
}

// close closes the event: at its deadline, or by a request.
func (s *settleTest) close(t *testing.T, o expiration.Outcome) error {
	return s.r.Close(t.Context(), expiration.Event{RoomID: testRoom}, o, time.Unix(1, 0), false, nil)
}

// closed closes the event, and retries after a passing fault. It returns how long that took.
func (s *settleTest) closed(t *testing.T) time.Duration {
	began := time.Now()
	for s.close(t, expiration.Expired) != nil {
		require.Less(t, time.Since(began), time.Minute)
		time.Sleep(time.Second)
	}
	return time.Since(began)
}

// Everything that arrived before is processed before the closing event is built, even if the worker ignores its queue.
func TestClosingIsBuiltUponTheQueue(t *testing.T) {
	for quiet := 50 * time.Second; quiet < 65*time.Second; quiet += 500 * time.Millisecond {
		for _, o := range []expiration.Outcome{expiration.Expired, expiration.Ended} {
			testSettling(t, func(t *testing.T, s *settleTest) {
				s.comes(t)
				time.Sleep(quiet)
				s.comes(t)
				all, _ := s.Backlog(t.Context(), testRoom)
				if began := time.Now(); o == expiration.Ended {
					require.NoError(t, s.close(t, o))
					require.Less(t, time.Since(began), callerSettles)
				} else {
					require.Less(t, s.closed(t), 8*time.Second)
				}
				require.GreaterOrEqual(t, s.upon.Done, all.Taken+all.Waiting)
				require.Equal(t, 1, s.built)
			})
		}
	}
}

// An attempt holds its place only briefly, and the attempts do not wait for ever.
func TestClosingDoesNotWaitForEver(t *testing.T) {
	testSettling(t, func(t *testing.T, s *settleTest) {
		s.Take(5 * time.Minute)
		s.comes(t)
		s.comes(t)
		began := time.Now()
		require.ErrorIs(t, s.close(t, expiration.Expired), errUnsettled)
		require.LessOrEqual(t, time.Since(began), laneSettles)
		took := s.closed(t)
		require.Less(t, took, 2*settlesFor)
		require.Greater(t, took, settlesFor/2)
		require.False(t, s.upon.Empty())
		for range 100 { // later attempts do not wait as long
			require.Less(t, s.closed(t), time.Second)
		}
	})
}

// In a room in which events arrive all the time, an attempt waits only for those that arrived before it.
func TestClosingBesideATorrent(t *testing.T) {
	testSettling(t, func(t *testing.T, s *settleTest) {
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(9 * time.Millisecond): // a little faster than the roomserver
					s.comes(t)
				}
			}
		}()
		time.Sleep(time.Second)
		require.Less(t, s.closed(t), 2*time.Second)
		s.Take(time.Second)
		time.Sleep(time.Minute)
		require.Less(t, s.closed(t), 2*settlesFor)
	})
}

// A room in which no event arrives is looked at only once.
func TestRoomsThatSettledAreNotAskedFor(t *testing.T) {
	testSettling(t, func(t *testing.T, s *settleTest) {
		require.NoError(t, s.close(t, expiration.Expired))
		s.Fail(true)
		require.NoError(t, s.close(t, expiration.Expired))
		s.comes(t)
		require.Error(t, s.close(t, expiration.Expired))
		s.Fail(false)
		require.NoError(t, s.close(t, expiration.Expired))
	})
}

func TestSettledRoomsAreBounded(t *testing.T) {
	s := newSettled(nil, nil, nil)
	for i := range maxSettled + 10 {
		s.begin(string(rune(i)) + testRoom)
	}
	require.Len(t, s.rooms, maxSettled)
}

// An event that arrives during a look makes the look void.
func TestLooksAreVoid(t *testing.T) {
	s := newSettled(nil, nil, nil)
	look, empty := s.begin(testRoom)
	require.False(t, empty)
	s.forget(testRoom)
	s.dealtWith(testRoom, look)
	look, empty = s.begin(testRoom)
	require.False(t, empty)
	s.dealtWith(testRoom, look)
	_, empty = s.begin(testRoom)
	require.True(t, empty)
}

func TestDelayedEventIsBuiltUponTheQueue(t *testing.T) {
	testSettling(t, func(t *testing.T, s *settleTest) {
		timer := expiration.Timer{Event: expiration.Event{RoomID: testRoom}, Deadline: time.Now().Add(-time.Second)}
		s.Take(2 * laneSettles)
		s.comes(t)
		_, err := s.r.Send(t.Context(), timer, expiration.Expired, nil)
		require.ErrorIs(t, err, errUnsettled)
		require.Zero(t, s.built)
		time.Sleep(4 * laneSettles)
		_, err = s.r.Send(t.Context(), timer, expiration.Expired, nil)
		require.NoError(t, err)
		require.Equal(t, 1, s.built)
	})
}

// In a room version whose redactions Dendrite does not apply, the timers must have processed the whole output stream first.
func TestClosingIsBuiltWhenTheTimersHaveHeard(t *testing.T) {
	testSettling(t, func(t *testing.T, s *settleTest) {
		s.last, s.acknowledged = 7, 6
		require.NoError(t, s.close(t, expiration.Expired))
		s.RoomVersion = gomatrixserverlib.RoomVersionV11
		s.comes(t)
		require.NoError(t, s.close(t, expiration.Expired), "no redaction has come")
		s.intake.settled.redacted(testRoom)
		require.ErrorIs(t, s.close(t, expiration.Expired), errUnsettled)
		s.acknowledged = 7
		require.NoError(t, s.close(t, expiration.Expired))
	})
}

// A room version that cannot be looked up does not mean that no redaction has come.
func TestClosingWaitsForTheRoomVersion(t *testing.T) {
	testSettling(t, func(t *testing.T, s *settleTest) {
		failed, version := errors.New("disk full"), s.intake.settled.version
		s.intake.settled.version = func(context.Context, string) (gomatrixserverlib.RoomVersion, error) { return "", failed }
		for range 2 {
			err := s.close(t, expiration.Expired)
			require.ErrorIs(t, err, errUnsettled)
			require.ErrorIs(t, err, failed)
		}
		s.RoomVersion, s.last = gomatrixserverlib.RoomVersionV11, 7
		s.intake.settled.version = version
		require.ErrorIs(t, s.close(t, expiration.Expired), errUnsettled, "the redaction may be in the stream")
		s.acknowledged = 7
		require.NoError(t, s.close(t, expiration.Expired))
		s.intake.settled.redacted(testRoom)
		s.intake.settled.version = func(context.Context, string) (gomatrixserverlib.RoomVersion, error) { return "", failed }
		require.Less(t, s.closed(t), 2*settlesFor, "the room may be gone")
	})
}

// While attempts wait for a room's queue, the room keeps the order of its deadlines. An attempt that waited in vain comes before later
// deadlines, whenever it is repeated, but they do not wait for it for ever.
func TestRoomsThatAreWaitedForKeepTheOrder(t *testing.T) {
	first, second := time.Unix(1, 0), time.Unix(2, 0)
	testSettling(t, func(t *testing.T, s *settleTest) {
		close := func(deadline time.Time) error {
			return s.r.Close(t.Context(), expiration.Event{RoomID: testRoom}, expiration.Expired, deadline, false, nil)
		}
		waitInVain := func() {
			s.Take(2 * laneSettles)
			s.comes(t)
			require.ErrorIs(t, close(first), errUnsettled)
			time.Sleep(4 * laneSettles)
		}
		waitInVain()
		require.ErrorIs(t, close(second), errUnsettled, "the queue is empty, but the first comes first")
		require.NoError(t, close(first))
		require.NoError(t, close(second))
		waitInVain()
		require.ErrorIs(t, close(second), errUnsettled)
		time.Sleep(settlesFor)
		require.NoError(t, close(second), "the first may be gone")
	})
}
