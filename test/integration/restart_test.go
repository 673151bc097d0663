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

// Section 5 of the contract: durability.

// afterCrash is how long it can take until clients see again all that the roomserver has: JetStream gives a message that a
// consumer had got and not acknowledged to it again after 30 seconds.
var afterCrash = 30*time.Second + soon

// afterQueue is how long it can take until the roomserver is done with all that it had been given: what a crash has left in
// its queue JetStream brings again after 5 minutes and 10 seconds, and until then the state of a room can be set back.
var afterQueue = 5*time.Minute + 10*time.Second + afterCrash

// afterLost is how long it can take until an event is closed that is set back for ever: the component waits for the queue, and a while
// longer.
var afterLost = 2 * afterQueue

func TestRestart(t *testing.T) {
	for name, crash := range map[string]bool{"SIGTERM": false, "SIGKILL": true} {
		t.Run(name, func(t *testing.T) {
			onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
				life := patience.Life(5)
				alice := s.newUser(t)
				roomID, other := s.room(t, alice), s.room(t, alice)
				running := alice.sendState(t, roomID, "running", 600, nil)
				held := alice.sendState(t, roomID, "held", life, nil)
				var overdue []string
				for range 5 {
					overdue = append(overdue, alice.sendMessage(t, roomID, 1).eventID)
				}
				alice.sendMessage(t, other, 1)
				replaced := alice.sendState(t, roomID, "replaced", 600, nil)
				alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "replaced"), JSON{"left": true})
				ended := alice.sendState(t, roomID, "ended", 600, nil)
				code, _ := s.keepAlive(t, "end", ended.token)
				require.Equal(t, http.StatusOK, code)
				s.refreshed(t, held.token)
				refreshed := time.Now()
				s.restart(t, crash)

				// What was refreshed right before the crash does not expire early.
				s.refreshed(t, running.token)
				s.refused(t, replaced.token)
				s.refused(t, ended.token)
				follower := alice.follow(t, roomID)
				if crash {
					follower.patience = afterCrash
				}
				for _, eventID := range overdue {
					follower.awaitClosing(t, eventID, "expired")
				}
				closing := follower.awaitClosing(t, held.eventID, "expired")
				require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), refreshed.Add(time.Duration(life)*time.Second-100*time.Millisecond).UnixMilli(), "early")

				var order []string
				for _, e := range alice.timeline(t, roomID) {
					if closes := e.Get(`content.m\.relates_to.event_id`).Str; e.Get("type").Str == "m.room.message" && closes != "" {
						order = append(order, closes)
					}
				}
				require.Equal(t, overdue, order, "in the order of their deadlines, each once")
				require.Equal(t, "ended", alice.state(t, roomID, "ended").Get(`content.m\.will_expire`).Str)
				eventuallyWithin(t, afterCrash, "the event that was ended", func() bool {
					return len(alice.closings(t, roomID, ended.eventID)) == 1
				})
				require.Empty(t, alice.closings(t, roomID, running.eventID))
				require.Empty(t, alice.closings(t, roomID, replaced.eventID))
				eventually(t, "nothing else is left", func() bool { return s.metric(t, "dendrite_expiration_running_timers") == 1 })

				// The same content again, as a client does that does not know what became of its request.
				require.Equal(t, running, alice.sendState(t, roomID, "running", 600, nil))
			})
		})
	}
}

// Whether state has replaced an expiring event is found out behind the answer. If the server crashes in between, and the output stream
// tells nothing of it, the token is refused all the same.
func TestReplacedBeforeTheCrash(t *testing.T) {
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			alice := s.newUser(t)
			roomID := s.room(t, alice)
			require.NoError(t, s.Failpoints(string(failpoint.Stream)+" hold"))
			other := alice.sendState(t, roomID, "other", 600, nil)
			byPlain, byExpiring := alice.sendState(t, roomID, "plain", 600, nil), alice.sendState(t, roomID, "expiring", 600, nil)
			now := alice.sendState(t, roomID, "expiring", 600, JSON{"again": true})
			alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "plain"), JSON{"left": true})
			s.restart(t, true)
			s.refused(t, byPlain.token)
			s.refused(t, byExpiring.token)
			s.refreshed(t, other.token)
			s.refreshed(t, now.token)
			require.NoError(t, s.Failpoints()) // or it would not stop
		})
	}
}

func TestRestartGrace(t *testing.T) {
	grace := time.Duration(patience.Life(4)) * time.Second
	onEachDatabase(t, JSON{"restart_grace": grace.String(), "rate_limiting": JSON{"enabled": false}}, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		roomID := s.room(t, alice)
		dead, live := alice.sendState(t, roomID, "dead", 1, nil), alice.sendState(t, roomID, "live", patience.Life(6), nil)
		s.Kill()
		<-time.After(1100 * time.Millisecond)
		before := time.Now()
		require.NoError(t, s.Start(t.Context()))
		s.refreshed(t, live.token)
		closing := alice.follow(t, roomID).awaitClosing(t, dead.eventID, "expired")
		require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), before.Add(grace).UnixMilli())
		s.refreshed(t, live.token)
	})
}

// A crash in the wrong moment makes JetStream forget how far its streams are. Their consumers, which remember it, must not
// wait until the streams are there again.
func TestStreamsThatForget(t *testing.T) {
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

// A crash can set the state of a room back: Dendrite takes an event out of those that are built upon when another refers to
// it, even if that other lies in the queue, and what is sent beside it is then all that the room has. The event is no longer
// the current state, and nobody has replaced it; when the other is done with it is back, and must be closed.
func TestStateSetBack(t *testing.T) {
	for _, other := range []struct {
		name string
		// send sends what refers to the event, and returns its ID.
		send func(t *testing.T, u *user, roomID string) string
		// crashed does what else there is to be done when it is as a crash leaves it between storing and sending.
		crashed func(t *testing.T, s *server, roomID, eventID string)
		within  time.Duration
	}{
		{
			name: "Expiring", // so our own component brings it
			send: func(t *testing.T, u *user, roomID string) string {
				t.Helper()
				return u.sendMessage(t, roomID, patience.Life(6)).eventID
			},
			crashed: func(*testing.T, *server, string, string) {},
			within:  afterCrash,
		},
		{
			name: "InTheQueue", // of a room in which nothing else happens
			send: sendPlain,
			crashed: func(t *testing.T, s *server, roomID, eventID string) {
				t.Helper()
				s.enqueue(t, roomID, eventID, quiet+soon)
			},
			within: quiet + soon + afterCrash,
		},
		{
			name: "Lost", // as what a fault of the database does to it: Dendrite says that it has done with it
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

				// A closing event that was built before the event, and is sent after it.
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

// quiet is how long nothing happens in a room until Dendrite reads its queue no longer.
const quiet = time.Minute

// enqueue puts an event of a server that does not run into the queue of the roomserver, as one that it had begun to work on, and that
// JetStream brings again after a while. After a crash that takes five minutes; there is no need to wait so long.
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

// head is what the events of a room are built upon, as the roomserver keeps it.
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

// rewind makes a room of a server that does not run what it was before an event was sent, which is stored all the same.
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
