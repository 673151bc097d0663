package delayid

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/httputil"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	plain  = `{"event_id":"$1","type":"m.x","content":{"n":9007199254740993}}`
	marked = `{"unsigned":{` + aliceHasSent + `},` + `"event_id":"$1","type":"m.x","content":{"n":9007199254740993}}`
)

// soon is a timeout that is longer than any step of these tests takes.
const soon = 20 * time.Second

// accounts is a fake user API, in which each access token is its user's ID.
type accounts struct{ asked atomic.Int32 }

func (u *accounts) QueryAccessToken(_ context.Context, req *userapi.QueryAccessTokenRequest, res *userapi.QueryAccessTokenResponse) error {
	u.asked.Add(1)
	if strings.HasPrefix(req.AccessToken, "@") {
		res.Device = &userapi.Device{UserID: req.AccessToken}
	}
	return nil
}

// serve serves a client API with the middleware. handler answers all requests.
func serve(t *testing.T, sent Sent, handler http.HandlerFunc) (url string, u *accounts) {
	t.Helper()
	u = &accounts{}
	routers := httputil.NewRouters()
	routers.Client.Use(Add(sent, u))
	routers.Client.NewRoute().Handler(handler)
	s := httptest.NewServer(routers.Client)
	t.Cleanup(s.Close)
	return s.URL + "/_matrix/client/", u
}

// answering returns a handler that answers as Dendrite's do.
func answering(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusOK)
		_, _ = io.WriteString(w, body)
	}
}

func request(t *testing.T, ctx context.Context, method, url, token string) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	require.NoError(t, err)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return http.DefaultClient.Do(req)
}

func get(t *testing.T, url, token string) (*http.Response, string) {
	t.Helper()
	res, err := request(t, t.Context(), http.MethodGet, url, token)
	require.NoError(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res, string(body)
}

func TestWhereDelayIDsAreAdded(t *testing.T) {
	url, _ := serve(t, sentBy{alice: {"$1": "d1"}}, answering(plain))
	for method, paths := range map[string]map[string]string{
		http.MethodGet: {
			"v3/sync": marked, "r0/sync": marked, "v3/sync?timeout=0": marked,
			"v3/rooms/!r/messages": marked, "r0/rooms/!r/messages?dir=b": marked, "v3/rooms/%21r%2F/messages": marked,
			"v3/rooms/!r/event/$1": marked, "r0/rooms/!r/event/%241%2F": marked,
			"v3/rooms/!r/context/$1": marked, "r0/rooms/!r/context/$1": marked,
			"v3/rooms/!r/members": marked, "r0/rooms/!r/members?membership=join": marked,
			"v3/rooms/!r/state": marked, "r0/rooms/!r/state": marked,
			"v3/rooms/!r/state/m.x?format=event": marked, "v3/rooms/!r/state/m.x/?format=event": marked,
			"r0/rooms/!r/state/m.x/k?format=event&format=content": marked, "v3/rooms/!r/state/m%2Fx/%2F?format=%65vent": marked,
			"v1/rooms/!r/relations/$1": marked, "unstable/rooms/!r/relations/%241%2F?dir=f": marked,
			"v1/rooms/!r/relations/$1/m.thread": marked, "unstable/rooms/!r/relations/$1/m.thread": marked,
			"v1/rooms/!r/relations/$1/m.thread/m.x": marked, "unstable/rooms/!r/relations/$1/m.thread/m%2Fx": marked,

			// Without format=event the answer is a content.
			"v3/rooms/!r/state/m.x": plain, "v3/rooms/!r/state/m.x/": plain, "r0/rooms/!r/state/m.x/k": plain,
			"v3/rooms/!r/state/m.x/k?format=content": plain, "v3/rooms/!r/state/m.x/k?format=content&format=event": plain,

			"v3/search": plain, "unstable/event_relationships": plain, "v3/rooms/!r/joined_members": plain, "v3/profile/x": plain,
			"v1/delayed_events/d1": plain, "unstable/org.matrix.msc4140/delayed_events/d1": plain,
			"v3/sync/x": plain, "v3/rooms/!r/send/messages": plain, "v3/rooms/messages": plain, "v3/x/rooms/!r/messages": plain,
			"v3/rooms/!r": plain, "v3/rooms/!r/": plain, "v3": plain, "v3/": plain, "": plain,
		},
		http.MethodPost: {
			"v3/search": marked, "r0/search?next_batch=2": marked, "unstable/event_relationships": marked,
			"v3/sync": plain, "v3/rooms/!r/state": plain, "v3/user_directory/search": plain,
		},
		http.MethodPut:     {"v3/sync": plain, "v3/search": plain, "v3/rooms/!r/state/m.x/k?format=event": plain},
		http.MethodOptions: {"v3/sync": plain, "v3/search": plain, "v3/rooms/!r/state": plain},
	} {
		for path, want := range paths {
			res, err := request(t, t.Context(), method, url+path, alice)
			require.NoError(t, err)
			body, err := io.ReadAll(res.Body)
			require.NoError(t, err)
			require.NoError(t, res.Body.Close())
			assert.Equal(t, want, string(body), "%s %s", method, path)
		}
	}
}

func TestWhoIsToldDelayIDs(t *testing.T) {
	sent := sentBy{alice: {"$1": "d1"}, "@bob:localhost": {"$2": "d2"}}
	url, _ := serve(t, sent, answering(plain))
	for token, want := range map[string]string{alice: marked, "@bob:localhost": plain, "@carol:localhost": plain, "forged": plain, "": plain} {
		_, body := get(t, url+"v3/sync", token)
		require.Equal(t, want, body, token)
	}
	_, body := get(t, url+"v3/sync?access_token="+alice, "")
	require.Equal(t, marked, body, "a token in the query")

	url, u := serve(t, sentBy{}, answering(plain))
	_, body = get(t, url+"v3/sync", alice)
	require.Equal(t, plain, body)
	require.Zero(t, u.asked.Load(), "while no delayed event was sent, nobody is looked up")
}

// Answers that are errors, not JSON, or compressed pass through, and their requesters are not looked up.
func TestOtherAnswersAreLeftAlone(t *testing.T) {
	for name, test := range map[string]struct {
		code                  int
		contentType, encoding string
	}{
		"error":      {http.StatusForbidden, "application/json", ""},
		"not JSON":   {http.StatusOK, "text/plain", ""},
		"compressed": {http.StatusOK, "application/json", "br"},
	} {
		t.Run(name, func(t *testing.T) {
			url, u := serve(t, sentBy{alice: {"$1": "d1"}}, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", test.contentType)
				if test.encoding != "" {
					w.Header().Set("Content-Encoding", test.encoding)
				}
				w.WriteHeader(test.code)
				_, _ = io.WriteString(w, plain)
			})
			res, body := get(t, url+"v3/sync", alice)
			require.Equal(t, test.code, res.StatusCode)
			require.Equal(t, plain, body)
			require.Zero(t, u.asked.Load())
		})
	}
}

func TestAnswersOfAllSizes(t *testing.T) {
	for name, length := range map[string]bool{"with a length": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			for _, n := range []int{1, 100, 50_000} {
				events := func(event string) string { return `{"chunk":[` + strings.Repeat(event+",", n) + event + `]}` }
				url, _ := serve(t, sentBy{alice: {"$1": "d1"}}, func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Type", "application/json; charset=utf-8")
					w.Header().Set("Access-Control-Allow-Origin", "*")
					body := events(plain)
					if length {
						w.Header().Set("Content-Length", strconv.Itoa(len(body)))
					}
					for i := 0; i < len(body); i += 1000 { // the first write also writes the header
						n, err := io.WriteString(w, body[i:min(i+1000, len(body))])
						if err != nil || n == 0 {
							t.Error(n, err)
						}
						w.(http.Flusher).Flush()
					}
				})
				for token, want := range map[string]string{alice: events(marked), "@bob:localhost": events(plain)} {
					res, body := get(t, url+"v3/sync", token)
					require.Equal(t, http.StatusOK, res.StatusCode)
					require.Equal(t, "*", res.Header.Get("Access-Control-Allow-Origin"))
					require.True(t, want == body, "%s, %d events", token, n)
					if length {
						require.EqualValues(t, len(want), res.ContentLength)
					}
				}
			}
		})
	}
}

// Answers to users without sent delayed events are not held back.
func TestOtherAnswersAreStreamed(t *testing.T) {
	read := make(chan struct{})
	url, _ := serve(t, sentBy{alice: {"$1": "d1"}}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, "[")
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Error(err)
		}
		select {
		case <-read:
		case <-time.After(soon):
			t.Error("the answer is held back")
		}
		_, _ = io.WriteString(w, "]")
	})
	res, err := request(t, t.Context(), http.MethodGet, url+"v3/sync", "@bob:localhost")
	require.NoError(t, err)
	defer res.Body.Close()
	first := make([]byte, 1)
	_, err = io.ReadFull(res.Body, first)
	require.NoError(t, err)
	close(read)
	rest, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	require.Equal(t, "[]", string(first)+string(rest))
}

// later is a fake in which the users' first delayed events count as sent only once sent is set.
type later struct {
	sentBy
	sent atomic.Bool
}

func (l *later) AnySent() bool            { return l.sent.Load() }
func (l *later) HasSent(user string) bool { return l.sent.Load() && l.sentBy.HasSent(user) }

// If the requester's first delayed event is sent while a sync waits, the sync's answer has its delay ID.
func TestSentWhileTheSyncWaits(t *testing.T) {
	sent := &later{sentBy: sentBy{alice: {"$1": "d1"}}}
	url, _ := serve(t, sent, func(w http.ResponseWriter, req *http.Request) {
		sent.sent.Store(true)
		answering(plain)(w, req)
	})
	_, body := get(t, url+"v3/sync", alice)
	require.Equal(t, marked, body)
}

// When the requester hangs up while the sync waits, the handler notices, and the requester is not looked up.
func TestRequesterGoesAway(t *testing.T) {
	waiting, done := make(chan struct{}), make(chan error, 1)
	url, u := serve(t, sentBy{alice: {"$1": "d1"}}, func(w http.ResponseWriter, req *http.Request) {
		close(waiting)
		select {
		case <-req.Context().Done():
		case <-time.After(soon):
			done <- errors.New("the context is not cancelled")
			return
		}
		answering(plain)(w, req)
		done <- nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-waiting
		cancel()
	}()
	_, err := request(t, ctx, http.MethodGet, url+"v3/sync", alice)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, <-done)
	require.Zero(t, u.asked.Load())
}

func TestErrorOfDelayIDs(t *testing.T) {
	log := logtest.NewGlobal()
	t.Cleanup(func() { logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{}) })
	sent := &asked{sentBy: sentBy{alice: {"$1": "d1"}}, err: errors.New("broken")}
	url, _ := serve(t, sent, answering(plain))
	res, body := get(t, url+"v3/sync", alice)
	require.Equal(t, http.StatusOK, res.StatusCode)
	require.Equal(t, plain, body)
	require.Equal(t, logrus.ErrorLevel, log.LastEntry().Level)
	require.Equal(t, "broken", fmt.Sprint(log.LastEntry().Data[logrus.ErrorKey]))
}

// When a handler panics, nothing that was held back is sent. If Dendrite recovers the panic, its answer of 500 passes through.
func TestPanic(t *testing.T) {
	url, _ := serve(t, sentBy{alice: {"$1": "d1"}}, func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Query().Has("late") {
			answering("["+strings.Repeat(plain+",", 1000)+plain+"]")(w, req)
			panic(http.ErrAbortHandler)
		}
		util.MakeJSONAPI(util.NewJSONRequestHandler(func(*http.Request) util.JSONResponse { panic("broken") }))(w, req)
	})
	_, err := request(t, t.Context(), http.MethodGet, url+"v3/sync?late", alice)
	require.ErrorIs(t, err, io.EOF)
	res, _ := get(t, url+"v3/sync", alice)
	require.Equal(t, http.StatusInternalServerError, res.StatusCode)
}

// BenchmarkOtherAnswers measures what the middleware costs requests whose answers get no delay IDs.
func BenchmarkOtherAnswers(b *testing.B) {
	nothing := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	handler := Add(sentBy{}, &accounts{})(nothing)
	for _, path := range []string{"v3/sync", "v3/rooms/!r/joined_members", "v3/profile/x"} {
		b.Run(path, func(b *testing.B) {
			w, req := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/_matrix/client/"+path, nil)
			b.ReportAllocs()
			for b.Loop() {
				handler.ServeHTTP(w, req)
			}
		})
	}
}
