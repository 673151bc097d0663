// Package integration tests docs/protocol.md from the outside: it runs the real binary, over HTTP, on SQLite and on PostgreSQL.
//
// Without build tags it tests rule by rule, which takes minutes. The tag all adds tests that take long, that measure, or that need other
// programs or servers. The command go run ./test/all runs all of them, group by group.
package integration

import (
	"bytes"
	"context"
	"encoding/hex"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

const memberType = "m.call.member"

// soon is longer than any step of these tests takes, except the waits that have a duration of their own.
var soon = patience.For(time.Minute)

// pollInterval is the time between two checks of a condition.
const pollInterval = 40 * time.Millisecond

type JSON = homeserver.JSON

// binary is the path of the server's binary. withFailpoints builds the same server with failpoints, at which it can crash or fail.
var (
	binary         string
	withFailpoints = sync.OnceValues(func() (string, error) {
		dir := filepath.Join(filepath.Dir(binary), "failpoints")
		if err := os.Mkdir(dir, 0o700); err != nil {
			return "", err
		}
		return homeserver.Build(context.Background(), dir, "-tags", "failpoints")
	})
)

// startWithFailpoints is start with a server that obeys Server.Failpoints.
func startWithFailpoints(t *testing.T, cfg homeserver.Config) *server {
	t.Helper()
	binary, err := withFailpoints()
	require.NoError(t, err)
	return startBinary(t, binary, cfg)
}

// atOnce is how many tests run at once. They mostly wait, so this is more than the number of processors.
const atOnce = "8"

func TestMain(m *testing.M) {
	_ = flag.Set("test.parallel", atOnce) // set before the command line is parsed, which may override it
	flag.Parse()
	dir, err := os.MkdirTemp("", "msc4140-integration-")
	if err == nil {
		// The race detector also checks the server under test.
		binary, err = homeserver.Build(context.Background(), dir, raceFlags...)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	say()
	postgres.Main(m, func() { _ = os.RemoveAll(dir) })
}

// database is one of the databases that all tests run on.
type database struct {
	name string
	// open returns the connection string of an empty database, as in homeserver.Config.
	open func(t testing.TB) string
}

// databases are those that this machine has. In CI it must have both.
var databases = func() []database {
	all := []database{{"SQLite", func(testing.TB) string { return "" }}, {"PostgreSQL", postgres.NewDatabase}}
	if postgres.Missing() != nil {
		return all[:1]
	}
	return all
}()

// say prints on the terminal which tests are left out. It writes to the terminal itself, because go test hides the output of packages
// whose tests pass.
func say() {
	line := leftOut
	if err := postgres.Missing(); err != nil {
		line += " NOT TESTED ON POSTGRESQL: " + err.Error()
	}
	if terminal, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0); err == nil && line != "" {
		_, _ = fmt.Fprintln(terminal, line)
		_ = terminal.Close()
	}
}

// unlimited is a configuration for tests that use tokens again and again.
var unlimited = map[string]any{"rate_limiting": JSON{"enabled": false}}

// onEachDatabase runs a test on each database, with a server of its own.
func onEachDatabase(t *testing.T, expiration map[string]any, test func(t *testing.T, s *server)) {
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel() // the tests mostly wait
			test(t, start(t, homeserver.Config{Postgres: db.open(t), Expiration: expiration}))
		})
	}
}

// server is a running homeserver, with assertions.
type server struct {
	*homeserver.Server
	cfg    homeserver.Config
	mu     sync.Mutex
	tokens []string // all issued tokens
	// delayIDs are secrets like tokens, except that their owners can read them again.
	delayIDs []string
	users    int
	panics   bool // the test causes panics in requests
}

// start starts a homeserver for one test. When the test ends, the server is stopped. Then everything that it wrote is searched for the
// tokens that it issued.
func start(t *testing.T, cfg homeserver.Config) *server {
	t.Helper()
	return startBinary(t, binary, cfg)
}

func startBinary(t *testing.T, binary string, cfg homeserver.Config) *server {
	t.Helper()
	hs, err := homeserver.New(binary, t.TempDir(), cfg)
	require.NoError(t, err)
	s := &server{Server: hs, cfg: cfg}
	require.NoError(t, s.Start(t.Context()))
	t.Cleanup(func() {
		s.tokens = append(s.tokens, s.delayIDs...)
		metrics, err := s.Anonymous().Do(context.Background(), http.MethodGet, "/metrics", nil)
		if err == nil {
			s.searchForTokens(t, "the metrics", metrics.Body)
		}
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		written, err := s.Written()
		if err != nil {
			t.Error(err)
		}
		if dir := os.Getenv("KEEP_LOGS"); t.Failed() && dir != "" {
			_ = os.WriteFile(dir+"/log", written, 0o600)
			_ = os.WriteFile(dir+"/metrics", metrics.Body, 0o600)
		}
		for name, data := range s.data(t, cfg.Postgres) {
			s.searchForTokens(t, name, data)
		}
		if i := bytes.Index(written, []byte("DATA RACE")); i >= 0 {
			t.Errorf("the server has a data race:\n%.4000s", written[i:])
		}
		if i := bytes.Index(written, []byte("Request panicked")); i >= 0 && !s.panics {
			t.Errorf("a request panicked:\n%.2000s", written[i:])
		}
	})
	return s
}

// tokenLength is the length of a token, and beginning the number of characters that are compared first.
const (
	tokenLength = 43
	beginning   = 8
)

// searchForTokens searches for all tokens in one pass, because there can be many tokens and much text.
func (s *server) searchForTokens(t *testing.T, where string, written []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	tokens := map[[beginning]byte][]string{} // by their first characters, which mostly suffice to see that there is no token
	for _, token := range s.tokens {
		for _, text := range []string{token, hex.EncodeToString([]byte(token))} { // PostgreSQL dumps bytes in hexadecimal
			key := [beginning]byte([]byte(text))
			tokens[key] = append(tokens[key], text)
		}
	}
	for run := range bytes.FieldsFuncSeq(written, notInTokens) {
		for i := range len(run) - tokenLength + 1 {
			for _, text := range tokens[[beginning]byte(run[i:])] {
				if bytes.HasPrefix(run[i:], []byte(text)) {
					t.Errorf("a token stands in %s", where)
					return
				}
			}
		}
	}
}

// notInTokens reports whether a character never occurs in a token.
func notInTokens(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-'
}

// data returns all data of the server: its files by name, and a dump of its PostgreSQL database, if it has one.
func (s *server) data(t *testing.T, dsn string) map[string][]byte {
	all := map[string][]byte{}
	err := filepath.WalkDir(s.Dir, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			all[path], err = os.ReadFile(path)
		}
		if os.IsNotExist(err) { // files may vanish while the server runs
			err = nil
		}
		return err
	})
	if err == nil && dsn != "" {
		all["PostgreSQL"], err = postgres.Dump(context.Background(), dsn)
	}
	if err != nil {
		t.Error(err)
	}
	return all
}

// bridge returns the registration file of an application service. Its token is as-token, and its users are those whose names begin with
// bridge.
func bridge(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "bridge.yaml")
	require.NoError(t, os.WriteFile(file, []byte(`
id: bridge
url: null
as_token: as-token
hs_token: hs-token
sender_localpart: bridge
namespaces: {users: [{exclusive: true, regex: "@bridge.*"}]}
rate_limited: true
`), 0o600))
	return file
}

// restart stops or kills the server, and starts it again.
func (s *server) restart(t *testing.T, crash bool) {
	t.Helper()
	if crash {
		s.Kill()
	} else {
		require.NoError(t, s.Stop())
	}
	require.NoError(t, s.Start(t.Context()))
}

// user is a client with assertions.
type user struct {
	*homeserver.Client
	s *server
}

// newUser makes an account with a new name.
func (s *server) newUser(t *testing.T) *user {
	t.Helper()
	s.mu.Lock()
	s.users++
	name := fmt.Sprintf("user%d", s.users)
	s.mu.Unlock()
	c, err := s.Register(t.Context(), name)
	require.NoError(t, err)
	return &user{c, s}
}

// room makes a room with the given users, all joined. The first one creates it.
func (s *server) room(t *testing.T, users ...*user) string {
	t.Helper()
	roomID, err := users[0].CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	for _, u := range users[1:] {
		require.NoError(t, u.Join(t.Context(), roomID))
	}
	return roomID
}

func (u *user) do(t *testing.T, method, path string, body any, header ...string) homeserver.Response {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), afterQueue)
	defer cancel()
	res, err := u.Do(ctx, method, path, body, header...)
	require.NoError(t, err)
	if isSend(method, path) {
		u.s.remember(res)
	} else {
		u.s.searchForTokens(t, "the answer to "+method+" "+path, res.Body)
	}
	return res
}

func (s *server) remember(res homeserver.Response) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if token := res.Get("expire_refresh_token").Str; token != "" {
		s.tokens = append(s.tokens, token)
	}
	if delayID := res.Get("delay_id").Str; delayID != "" {
		s.delayIDs = append(s.delayIDs, delayID)
	}
}

// isSend reports whether a request sends an event, so that its answer may contain a token.
func isSend(method, path string) bool {
	return (method == http.MethodPut || method == http.MethodPost) &&
		(strings.Contains(path, "/send/") || strings.Contains(path, "/state/") || strings.Contains(path, "/delayed_event/"))
}

// must is do for a request that must succeed.
func (u *user) must(t *testing.T, method, path string, body any) homeserver.Response {
	t.Helper()
	res := u.do(t, method, path, body)
	require.Equal(t, http.StatusOK, res.Code, "%s %s: %s", method, path, res)
	return res
}

// sent is the answer to the send of an expiring event.
type sent struct {
	eventID, token string
}

// sendState sends an expiring state event, which must be accepted.
func (u *user) sendState(t *testing.T, roomID, stateKey string, seconds int, content JSON) sent {
	t.Helper()
	body := JSON{"m.will_expire": seconds}
	for key, value := range content {
		body[key] = value
	}
	return sentBy(t, u.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, stateKey), body))
}

// sendMessage sends an expiring message, which must be accepted.
func (u *user) sendMessage(t *testing.T, roomID string, seconds int) sent {
	t.Helper()
	return sentBy(t, u.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"),
		JSON{"m.will_expire": seconds, "msgtype": "m.text", "body": "hello"}))
}

func sentBy(t *testing.T, res homeserver.Response) sent {
	t.Helper()
	result := sent{res.Get("event_id").Str, res.Get("expire_refresh_token").Str}
	require.NotEmpty(t, result.eventID, res)
	require.NotEmpty(t, result.token, res)
	return result
}

// keepAlive calls the keep-alive endpoint and returns status and error code.
func (s *server) keepAlive(t *testing.T, method, token string) (int, string) {
	t.Helper()
	res, err := s.Anonymous().KeepAlive(t.Context(), method, token)
	require.NoError(t, err)
	s.searchForTokens(t, "the answer to a keep-alive", res.Body)
	return res.Code, res.Get("errcode").Str
}

func (s *server) refreshed(t *testing.T, token string) {
	t.Helper()
	code, errcode := s.keepAlive(t, "refresh", token)
	require.Equal(t, http.StatusOK, code, errcode)
}

// refused requires that the server refuses a token.
func (s *server) refused(t *testing.T, token string) {
	t.Helper()
	code, errcode := s.keepAlive(t, "refresh", token)
	require.Equal(t, http.StatusNotFound, code)
	require.Equal(t, "M_NOT_FOUND", errcode)
}

// state returns the current state event, if there is one.
func (u *user) state(t *testing.T, roomID, stateKey string) gjson.Result {
	t.Helper()
	res := u.do(t, http.MethodGet, homeserver.StatePath(roomID, memberType, stateKey)+"?format=event", nil)
	if res.Code == http.StatusNotFound {
		return gjson.Result{}
	}
	require.Equal(t, http.StatusOK, res.Code, res)
	return res.Get("@this")
}

// timeline returns all events of a room that were sent before the call, the oldest first.
func (u *user) timeline(t *testing.T, roomID string) []gjson.Result {
	t.Helper()
	// Dendrite answers from a copy that follows the roomserver in order, so a mark shows when the copy is up to date. After a crash Dendrite
	// waits until pending messages are delivered again. After very many events the copy is minutes behind.
	const markType = "org.example.mark"
	mark := u.must(t, http.MethodPut, homeserver.SendPath(roomID, markType), JSON{}).Get("event_id").Str
	for done, seen := false, ""; !done; {
		eventuallyWithin(t, afterCrash, "the mark, or anything new", func() bool {
			newest, end := u.messages(t, roomID, "")
			done = slices.ContainsFunc(newest, func(e gjson.Result) bool { return e.Get("event_id").Str == mark })
			news := end != seen
			seen = end
			return done || news
		})
	}
	var events []gjson.Result
	for from := ""; ; {
		page, end := u.messages(t, roomID, from)
		events = append(events, page...)
		if len(page) == 0 || end == "" || end == from {
			break
		}
		from = end
	}
	slices.Reverse(events)
	return slices.DeleteFunc(events, func(e gjson.Result) bool { return e.Get("type").Str == markType })
}

// messages returns a page of a room's events, the newest first, and the token of the next page.
func (u *user) messages(t *testing.T, roomID, from string) (page []gjson.Result, end string) {
	t.Helper()
	path := "/_matrix/client/v3/rooms/" + url.PathEscape(roomID) + "/messages?dir=b&limit=100"
	if from != "" {
		path += "&from=" + url.QueryEscape(from)
	}
	res := u.must(t, http.MethodGet, path, nil)
	return res.Get("chunk").Array(), res.Get("end").Str
}

// event returns one event of a room. It waits until the event is visible.
func (u *user) event(t *testing.T, roomID, eventID string) gjson.Result {
	t.Helper()
	return u.follow(t, roomID).awaitEvent(t, eventID)
}

// closings returns the closing events of an event.
func (u *user) closings(t *testing.T, roomID, eventID string) (found []gjson.Result) {
	t.Helper()
	for _, e := range u.timeline(t, roomID) {
		if e.Get(`content.m\.relates_to.event_id`).Str == eventID && e.Get(`content.m\.will_expire`).Exists() {
			found = append(found, e)
		}
	}
	return found
}

// follower reads a user's /sync.
type follower struct {
	u      *user
	roomID string
	since  string
	seen   []gjson.Result
	// patience limits the wait for an event.
	patience time.Duration
}

// follow starts to read the events of a room.
func (u *user) follow(t *testing.T, roomID string) *follower {
	t.Helper()
	f := &follower{u: u, roomID: roomID, patience: soon}
	f.read(t, 0)
	return f
}

// read makes one sync request, which waits for new events up to the given time.
func (f *follower) read(t *testing.T, timeout time.Duration) []gjson.Result {
	t.Helper()
	res := f.u.must(t, http.MethodGet, fmt.Sprintf("/_matrix/client/v3/sync?since=%s&timeout=%d",
		url.QueryEscape(f.since), timeout.Milliseconds()), nil)
	f.since = res.Get("next_batch").Str
	room := res.Get("rooms.join." + gjsonKey(f.roomID))
	events := append(room.Get("state.events").Array(), room.Get("timeline.events").Array()...)
	f.seen = append(f.seen, events...)
	return events
}

// await returns the first matching event, new or already seen.
func (f *follower) await(t *testing.T, what string, matches func(gjson.Result) bool) gjson.Result {
	t.Helper()
	deadline := time.Now().Add(f.patience)
	for events := f.seen; ; events = f.read(t, time.Second) {
		for _, e := range events {
			if matches(e) {
				return e
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come", what)
		}
	}
}

// awaitEvent waits for an event and returns it.
func (f *follower) awaitEvent(t *testing.T, eventID string) gjson.Result {
	t.Helper()
	return f.await(t, eventID, func(e gjson.Result) bool { return e.Get("event_id").Str == eventID })
}

// awaitClosing waits for the closing event of an event and returns it.
func (f *follower) awaitClosing(t *testing.T, eventID, outcome string) gjson.Result {
	t.Helper()
	e := f.await(t, "the closing event of "+eventID, func(e gjson.Result) bool {
		return e.Get(`content.m\.relates_to.event_id`).Str == eventID && e.Get(`content.m\.relates_to.rel_type`).Str == "m.expire.relationship"
	})
	require.Equal(t, outcome, e.Get(`content.m\.will_expire`).Str)
	return e
}

// gjsonKey quotes a key for a gjson path.
func gjsonKey(key string) string {
	var quoted []byte
	for i := range len(key) {
		if bytes.IndexByte([]byte(`.*?|#@!{}[]()=<>%\:`), key[i]) >= 0 {
			quoted = append(quoted, '\\')
		}
		quoted = append(quoted, key[i])
	}
	return string(quoted)
}

// eventually waits until a condition holds. It polls, because nothing announces the change.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	eventuallyWithin(t, soon, what, holds)
}

func eventuallyWithin(t *testing.T, d time.Duration, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !holds(); time.Sleep(pollInterval) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}
