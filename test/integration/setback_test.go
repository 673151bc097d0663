//go:build all

package integration

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/matrix-org/dendrite/setup/process"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// After a crash at the wrong moment JetStream may lose messages, so that the sequence numbers of a stream start again. The consumers
// remember the higher numbers. They must not wait until the stream reaches them again.
func TestStreamsThatForget(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		roomID := s.room(t, alice)
		running := alice.sendState(t, roomID, "running", 600, nil)
		expiring := alice.sendMessage(t, roomID, patience.Life(4))
		alice.follow(t, roomID).awaitEvent(t, expiring.eventID)
		s.Kill()
		streams, err := filepath.Glob(filepath.Join(s.Dir, "jetstream", "jetstream", "$G", "streams", "*", "msgs"))
		require.NoError(t, err)
		require.NotEmpty(t, streams)
		for _, stream := range streams {
			require.NoError(t, os.RemoveAll(stream))
		}
		require.NoError(t, s.Start(t.Context()))
		written, err := s.Written()
		require.NoError(t, err)
		require.Contains(t, string(written), "the consumer begins anew", "no stream forgot anything")

		follower := alice.follow(t, roomID)
		follower.awaitClosing(t, expiring.eventID, "expired")
		follower.awaitEvent(t, alice.sendMessage(t, roomID, 600).eventID)
		alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "running"), JSON{"left": true})
		s.refused(t, running.token)
	})
}

// A crash can make a room's state regress. Dendrite removes an event from the forward extremities as soon as another event references it,
// even if that event is still queued. An event sent in parallel is then the only forward extremity. The removed event is no longer current
// state, although no event has replaced it. When the queued event is processed, the removed event is current again and must be closed.
func TestStateSetBack(t *testing.T) {
	t.Parallel()
	for _, other := range []struct {
		name string
		// send sends an event that references the expiring event, and returns its ID.
		send func(t *testing.T, u *user, roomID string) string
		// crashed makes further changes, so that the data look as after a crash between storing and sending.
		crashed func(t *testing.T, s *server, roomID, eventID string)
		within  time.Duration
	}{
		{
			name: "Expiring", // so that the engine sends it again
			send: func(t *testing.T, u *user, roomID string) string {
				t.Helper()
				return u.sendMessage(t, roomID, patience.Life(6)).eventID
			},
			crashed: func(*testing.T, *server, string, string) {},
			within:  afterCrash,
		},
		{
			name: "InTheQueue", // of a room without further events
			send: sendPlain,
			crashed: func(t *testing.T, s *server, roomID, eventID string) {
				t.Helper()
				s.enqueue(t, roomID, eventID, redelivered)
			},
			within: redelivered + afterCrash,
		},
		{
			name: "Lost", // as after a failure of the database: Dendrite says that it has processed the event
			send: sendPlain,
			crashed: func(t *testing.T, s *server, _, _ string) {
				t.Helper()
				require.NoError(t, s.Failpoints(string(failpoint.Awaiting)+" fail"))
			},
			within: afterCrash,
		},
	} {
		for _, db := range databases {
			t.Run(other.name+"/"+db.name, func(t *testing.T) {
				t.Parallel()
				s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
				alice, bob := s.newUser(t), s.newUser(t)
				roomID := s.room(t, alice, bob)

				// This closing event is built before the event, and sent after it.
				require.NoError(t, s.Failpoints(string(failpoint.AfterClaim)+" hold"))
				early := alice.sendState(t, roomID, "early", 1, nil)
				eventually(t, "the claim", func() bool {
					rows := s.timers(t)
					return len(rows) == 1 && rows[0].Claim != nil
				})
				e := bob.sendState(t, roomID, "key", patience.Life(4), nil)
				head := s.head(t, roomID)
				late := other.send(t, bob, roomID)
				s.Kill()
				require.NoError(t, s.Failpoints())
				s.rewind(t, roomID, head, late)
				other.crashed(t, s, roomID, late)
				require.NoError(t, s.Start(t.Context()))

				alice.follow(t, roomID).awaitClosing(t, early.eventID, "expired")
				require.False(t, alice.state(t, roomID, "key").Exists(), "the state was not set back")
				s.refreshed(t, e.token)
				eventuallyWithin(t, other.within, "the closing event", func() bool {
					return alice.state(t, roomID, "key").Get(`content.m\.will_expire`).Str == "expired"
				})
				require.Len(t, alice.closings(t, roomID, e.eventID), 1)
			})
		}
	}
}

func sendPlain(t *testing.T, u *user, roomID string) string {
	t.Helper()
	return u.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"body": "hello"}).Get("event_id").Str
}

// quiet is the time without events after which Dendrite stops reading a room's queue. redelivered is when JetStream then delivers an
// event.
const (
	quiet       = time.Minute
	redelivered = quiet + 20*time.Second
)

// enqueue puts an event into the roomserver's queue of a stopped server, as if the roomserver had begun to process it. JetStream delivers
// it again after the given time. After a real crash that takes five minutes, which is too long for a test.
func (s *server) enqueue(t *testing.T, roomID, eventID string, after time.Duration) {
	t.Helper()
	var event []byte
	s.database(t, "roomserver", func(cm *sqlutil.Connections, options *config.DatabaseOptions) {
		db, _, err := cm.Connection(options)
		require.NoError(t, err)
		require.NoError(t, db.QueryRowContext(t.Context(), "SELECT event_json FROM roomserver_event_json"+
			" WHERE event_nid = (SELECT event_nid FROM roomserver_events WHERE event_id = $1)", eventID).Scan(&event))
	})
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersionV10)
	require.NoError(t, err)
	pdu, err := version.NewEventFromTrustedJSON(event, false)
	require.NoError(t, err)
	input, err := json.Marshal(api.InputRoomEvent{
		Kind: api.KindNew, Event: &types.HeaderedEvent{PDU: pdu}, Origin: "localhost", SendAsServer: "localhost",
	})
	require.NoError(t, err)

	ctx := process.NewProcessContext()
	defer func() { ctx.ShutdownDendrite(); ctx.WaitForComponentsToFinish() }()
	cfg := &config.JetStream{StoragePath: config.Path(filepath.Join(s.Dir, "jetstream")), TopicPrefix: "Dendrite", NoLog: true, Matrix: &config.Global{}}
	js, connection := new(jetstream.NATSInstance).Prepare(ctx, cfg)
	msg := nats.NewMsg(cfg.Prefixed(jetstream.InputRoomEventSubj(roomID)))
	msg.Header.Set(jetstream.RoomID, roomID)
	msg.Data = input
	_, err = js.PublishMsg(msg)
	require.NoError(t, err)
	consumer := cfg.Prefixed("RoomInput" + jetstream.Tokenise(roomID))
	sub, err := js.PullSubscribe(msg.Subject, consumer, nats.Bind(cfg.Prefixed(jetstream.InputRoomEvent), consumer))
	require.NoError(t, err)
	begun, err := sub.Fetch(1, nats.MaxWait(soon))
	require.NoError(t, err)
	_, err = connection.Request(begun[0].Reply, fmt.Appendf(nil, `-NAK {"delay": %d}`, after.Nanoseconds()), soon)
	require.NoError(t, err)
}

// head has a room's forward extremities and state, as the roomserver stores them.
type head struct {
	latest   string
	last     int64
	snapshot int64
}

func (s *server) head(t *testing.T, roomID string) (h head) {
	t.Helper()
	s.database(t, "roomserver", func(cm *sqlutil.Connections, options *config.DatabaseOptions) {
		db, _, err := cm.Connection(options)
		require.NoError(t, err)
		require.NoError(t, db.QueryRowContext(t.Context(),
			"SELECT latest_event_nids, last_event_sent_nid, state_snapshot_nid FROM roomserver_rooms WHERE room_id = $1", roomID,
		).Scan(&h.latest, &h.last, &h.snapshot))
	})
	return h
}

// rewind restores a room of a stopped server to the given head, as if the event had been stored but not sent.
func (s *server) rewind(t *testing.T, roomID string, h head, eventID string) {
	t.Helper()
	s.database(t, "roomserver", func(cm *sqlutil.Connections, options *config.DatabaseOptions) {
		db, _, err := cm.Connection(options)
		require.NoError(t, err)
		_, err = db.ExecContext(t.Context(), "UPDATE roomserver_rooms"+
			" SET latest_event_nids = $1, last_event_sent_nid = $2, state_snapshot_nid = $3 WHERE room_id = $4",
			h.latest, h.last, h.snapshot, roomID)
		require.NoError(t, err)
		_, err = db.ExecContext(t.Context(), "UPDATE roomserver_events SET sent_to_output = FALSE WHERE event_id = $1", eventID)
		require.NoError(t, err)
	})
}

// afterLost is how long it can take until an event is closed that never becomes current state again. The engine waits for the queue, and
// then some more time.
var afterLost = 2 * afterQueue
