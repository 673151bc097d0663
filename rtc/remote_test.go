package rtc

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
)

var remoteBody = with(aliceBody, JSON{"url": otherSFU, "server_name": "b.example"})

// Another server makes the token for its SFU. It gets the member in the form in which the client has given it.
func TestTokenOfAnotherServer(t *testing.T) {
	for name, test := range map[string]struct {
		changes JSON
		asked   string
	}{
		"Newest": {JSON{}, `{"url":"wss://sfu.b.example","room_id":"!room:a.example","slot_id":"m.call#ROOM","user_id":"@alice:a.example","member_id":"abc"}`},
		"Older": {JSON{"member_id": nil, "member": JSON{"id": "abc", "claimed_device_id": "DEV", "claimed_user_id": "@bob:a.example"}},
			`{"url":"wss://sfu.b.example","room_id":"!room:a.example","slot_id":"m.call#ROOM","user_id":"@alice:a.example","member":{"id":"abc","claimed_device_id":"DEV"}}`},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			w.servers.answer = func(_ *http.Request, body gjson.Result) (int, string) {
				require.JSONEq(t, test.asked, body.Raw)
				return http.StatusOK, `{"jwt":"of b"}`
			}
			a := w.ask(paths[0], "@alice:a.example", with(remoteBody, test.changes))
			require.JSONEq(t, `{"jwt":"of b"}`, a.Body.String())
			require.Equal(t, []string{"b.example/_matrix/federation" + paths[1]}, w.servers.asked)
			require.Empty(t, w.sfu.rooms)
		})
	}
}

// A server that does not know the unstable path is asked on the stable one.
func TestStablePathOfAnotherServer(t *testing.T) {
	w := newWorld(t, nil)
	w.servers.answer = func(req *http.Request, _ gjson.Result) (int, string) {
		if strings.Contains(req.URL.Path, "unstable") {
			return http.StatusNotFound, `{"errcode":"M_UNRECOGNIZED"}`
		}
		return http.StatusOK, `{"jwt":"of b"}`
	}
	require.Equal(t, "of b", w.ask(paths[0], "@alice:a.example", remoteBody).Get("jwt").Str)
	require.Len(t, w.servers.asked, 2)
}

// Two errors of another server are handed on. Everything else is one error, whatever it is.
func TestErrorsOfAnotherServer(t *testing.T) {
	for name, test := range map[string]struct {
		status  int
		answer  string
		want    int
		errcode string
		asked   int
	}{
		"Forbidden":     {http.StatusForbidden, `{"errcode":"M_FORBIDDEN","error":"no"}`, http.StatusForbidden, "M_FORBIDDEN", 1},
		"NotTheirs":     {http.StatusBadRequest, `{"errcode":"M_INVALID_PARAM","error":"no"}`, http.StatusBadRequest, "M_INVALID_PARAM", 1},
		"BadJSON":       {http.StatusBadRequest, `{"errcode":"M_BAD_JSON","error":"no"}`, http.StatusBadGateway, "M_UNKNOWN", 1},
		"OtherStatus":   {http.StatusBadRequest, `{"errcode":"M_FORBIDDEN","error":"no"}`, http.StatusBadGateway, "M_UNKNOWN", 1},
		"Limited":       {http.StatusTooManyRequests, `{"errcode":"M_LIMIT_EXCEEDED"}`, http.StatusBadGateway, "M_UNKNOWN", 1},
		"UnknownTwice":  {http.StatusNotFound, `{"errcode":"M_UNRECOGNIZED"}`, http.StatusBadGateway, "M_UNKNOWN", 2},
		"ProxyError":    {http.StatusForbidden, `<html>`, http.StatusBadGateway, "M_UNKNOWN", 1},
		"NoToken":       {http.StatusOK, `{}`, http.StatusBadGateway, "M_UNKNOWN", 1},
		"TokenIsNumber": {http.StatusOK, `{"jwt":5}`, http.StatusBadGateway, "M_UNKNOWN", 1},
		"NotJSON":       {http.StatusOK, `{"jwt":"x`, http.StatusBadGateway, "M_UNKNOWN", 1},
		"Endless":       {http.StatusOK, `{"jwt":"` + strings.Repeat("x", 1<<20) + `"}`, http.StatusBadGateway, "M_UNKNOWN", 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			w.servers.answer = func(*http.Request, gjson.Result) (int, string) { return test.status, test.answer }
			a := w.ask(paths[0], "@alice:a.example", remoteBody)
			refused(t, a, test.want, test.errcode)
			require.Equal(t, test.want != http.StatusBadGateway, a.Get("error").Str == "no")
			require.Len(t, w.servers.asked, test.asked)
		})
	}
	t.Run("Unreachable", func(t *testing.T) {
		refused(t, newWorld(t, nil).ask(paths[0], "@alice:a.example", remoteBody), http.StatusBadGateway, "M_UNKNOWN")
	})
}

// A server that is not in the room is not asked.
func TestStrangersAreNotAsked(t *testing.T) {
	w := newWorld(t, nil)
	for _, server := range []string{"d.example", "127.0.0.1:22/x", "b.example?", "%"} {
		refused(t, w.ask(paths[0], "@alice:a.example", with(remoteBody, JSON{"server_name": server})), http.StatusForbidden, "M_FORBIDDEN")
	}
	alone := with(remoteBody, JSON{"room_id": "!alone:a.example"})
	refused(t, w.ask(paths[0], "@alice:a.example", alone), http.StatusForbidden, "M_FORBIDDEN")
	require.Empty(t, w.servers.asked)
}

// hang answers nothing until the request is given up.
func hang(req *http.Request, _ gjson.Result) (int, string) {
	<-req.Context().Done()
	return 0, ""
}

// A server that does not answer costs ten seconds.
func TestAnotherServerHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.servers.answer = hang
		began := time.Now()
		refused(t, w.ask(paths[0], "@alice:a.example", remoteBody), http.StatusBadGateway, "M_UNKNOWN")
		require.Equal(t, remoteTimeout, time.Since(began))
	})
}

// membership is a member of a call, who publishes to an SFU.
func membership(sender string, age int, eventType, content string) string {
	return fmt.Sprintf(`{"type":%q,"room_id":%q,"sender":%q,"state_key":%q,"origin_server_ts":%d,"content":%s,"depth":1,"auth_events":[],"prev_events":[]}`,
		eventType, roomID, sender, "_"+sender+"_DEV", 1000-age, content)
}

// Without a server name the server is found by who publishes to the SFU, in all forms of memberships.
func TestServerOfAPublisher(t *testing.T) {
	publishing := func(field string) string { return `{"` + field + `":[{"type":"livekit","url":"` + otherSFU + `/"}]}` }
	body := with(aliceBody, JSON{"url": otherSFU})
	for _, eventType := range []string{"org.matrix.msc3401.call.member", "m.call.member", "org.matrix.msc4143.rtc.member", "m.rtc.member"} {
		for _, field := range []string{"foci_preferred", "rtc_transports"} {
			w := newWorld(t, nil)
			w.rooms.state = []string{
				membership("@bob:a.example", 9, eventType, publishing(field)),
				membership("@erin:d.example", 8, eventType, `{"foci_preferred":[{"url":"wss://elsewhere"},5],"rtc_transports":{}}`),
				membership("@dave:c.example", 1, eventType, publishing(field)),
				membership("@carol:b.example", 3, eventType, publishing(field)),
				membership("@carl:b.example", 2, eventType, publishing(field)),
			}
			w.servers.answer = func(req *http.Request, _ gjson.Result) (int, string) {
				if req.URL.Host == "b.example" {
					return http.StatusBadRequest, `{"errcode":"M_INVALID_PARAM","error":"not ours"}`
				}
				return http.StatusOK, `{"jwt":"of c"}`
			}
			a := w.ask(paths[0], "@alice:a.example", body)
			require.Equal(t, "of c", a.Get("jwt").Str, a.Body)
			require.Equal(t, []string{"b.example/_matrix/federation" + paths[1], "c.example/_matrix/federation" + paths[1]}, w.servers.asked)
		}
	}
	w := newWorld(t, nil)
	w.rooms.state = []string{membership("@bob:a.example", 9, "m.call.member", publishing("foci_preferred"))}
	refused(t, w.ask(paths[0], "@alice:a.example", body), http.StatusBadRequest, "M_INVALID_PARAM")
	require.Empty(t, w.servers.asked)
}

// Members who claim to publish to an SFU cannot make this server ask many others, or wait for long.
func TestManyPublishers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		for i := range 20 {
			user := fmt.Sprintf("@mallory:m%d.example", i)
			w.rooms.rooms[roomID] = append(w.rooms.rooms[roomID], user)
			w.rooms.state = append(w.rooms.state, membership(user, i, "m.call.member", `{"foci_preferred":[{"url":"`+otherSFU+`"}]}`))
		}
		w.servers.answer = hang
		began := time.Now()
		body := with(aliceBody, JSON{"url": otherSFU})
		refused(t, w.ask(paths[0], "@alice:a.example", body), http.StatusBadGateway, "M_UNKNOWN")
		require.LessOrEqual(t, time.Since(began), remoteTimeout)
		require.Len(t, w.servers.asked, maxPublishers)

		w.servers.answer = func(req *http.Request, body gjson.Result) (int, string) {
			if len(w.servers.asked) < 2*maxPublishers {
				return hang(req, body)
			}
			return http.StatusOK, `{"jwt":"of the last"}`
		}
		require.Equal(t, "of the last", w.ask(paths[0], "@alice:a.example", body).Get("jwt").Str, "one that hangs leaves time for the others")
	})
}

// The library's client logs the URLs of requests, and puts them into errors. An OpenID token is in such a URL.
func TestTokensAreNotLogged(t *testing.T) {
	old := logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
	level := logrus.GetLevel()
	defer func() { logrus.StandardLogger().ReplaceHooks(old); logrus.SetLevel(level) }()
	logrus.SetLevel(logrus.TraceLevel)
	hook := logtest.NewGlobal()
	// Federation is off: each request fails, and the client says so.
	client := fclient.NewClient(fclient.WithTransport(roundTrip(func(*http.Request) (*http.Response, error) { return nil, errAway })))
	w := newWorld(t, func(w *world) { w.client = client })
	refused(t, w.askService("/get_token", with(serviceBody, JSON{
		"openid_token": JSON{"access_token": "openid-secret", "matrix_server_name": "b.example"},
		"member":       JSON{"id": "abc", "claimed_user_id": "@carol:b.example", "claimed_device_id": "DEV"},
	})), http.StatusUnauthorized, "M_UNAUTHORIZED")
	failed := false
	for _, e := range hook.AllEntries() {
		line, err := e.String()
		require.NoError(t, err)
		require.NotContains(t, line, "openid-secret")
		failed = failed || strings.Contains(line, "Failed to verify an OpenID token")
	}
	require.True(t, failed, "the failure itself is logged")
}

// roundTrip is a transport.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// A place is not kept by a request that has hung up.
func TestHangingUpWhileAnotherServerHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld(t, nil)
		w.servers.answer = hang
		time.AfterFunc(time.Second, cancel)
		began := time.Now()
		w.askWith(ctx, paths[0], "@alice:a.example", remoteBody)
		require.Equal(t, time.Second, time.Since(began))
	})
}
