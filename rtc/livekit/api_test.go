package livekit

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// sfu answers a client's requests in place of LiveKit.
type sfu func(*http.Request) (*http.Response, error)

func (f sfu) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// answering returns a client whose requests get one answer. The answer repeats the request's token wherever it has the word TOKEN.
func answering(status int, body string, header ...string) *Client {
	c := newClient()
	c.http.Transport = sfu(func(r *http.Request) (*http.Response, error) {
		h := http.Header{}
		for i := 0; i < len(header); i += 2 {
			h.Set(header[i], header[i+1])
		}
		body := strings.ReplaceAll(body, "TOKEN", strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
	})
	return c
}

var (
	testParticipant = Participant{Room: "a room", Identity: "somebody"}
	// calls are all methods that call LiveKit, each with a success that LiveKit has for it, and with what the success becomes.
	calls = map[string]struct {
		call            func(context.Context, *Client) (any, error)
		request, grants string // JSON
		success         string // JSON
		result          any
	}{
		"CreateRoom": {
			func(ctx context.Context, c *Client) (any, error) { return c.CreateRoom(ctx, "a room") },
			`{"name": "a room", "empty_timeout": 300, "departure_timeout": 20, "max_participants": 0}`, `{"roomCreate": true}`,
			`{"sid": "RM_1", "name": "a room", "empty_timeout": 300}`, Room{SID: "RM_1", Name: "a room"},
		},
		"ListRooms": {
			func(ctx context.Context, c *Client) (any, error) { return c.Room(ctx, "a room") },
			`{"names": ["a room"]}`, `{"roomList": true}`,
			`{"rooms": [{"sid": "RM_1", "name": "a room"}]}`, Room{SID: "RM_1", Name: "a room"},
		},
		"ListParticipants": {
			func(ctx context.Context, c *Client) (any, error) { return c.Participants(ctx, "a room") },
			`{"room": "a room"}`, `{"roomAdmin": true, "room": "a room"}`,
			`{"participants": [{"sid": "PA_1", "identity": "somebody", "state": "ACTIVE"}]}`,
			[]Session{{SID: "PA_1", Identity: "somebody", State: Active}},
		},
		"GetParticipant": {
			func(ctx context.Context, c *Client) (any, error) { return c.Participant(ctx, testParticipant) },
			`{"room": "a room", "identity": "somebody"}`, `{"roomAdmin": true, "room": "a room"}`,
			`{"sid": "PA_1", "identity": "somebody", "state": "JOINING", "joined_at": "946684800"}`,
			Session{SID: "PA_1", Identity: "somebody", State: Joining},
		},
		"RemoveParticipant": {
			func(ctx context.Context, c *Client) (any, error) { return nil, c.Remove(ctx, testParticipant) },
			`{"room": "a room", "identity": "somebody"}`, `{"roomAdmin": true, "room": "a room"}`,
			`{}`, nil,
		},
	}
)

// Each method sends what LiveKit wants, with a token that allows only that, and only for a minute.
func TestCalls(t *testing.T) {
	for method, test := range calls {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // it is 946684800
				c := answering(http.StatusOK, test.success)
				answer := c.http.Transport
				c.http.Transport = sfu(func(r *http.Request) (*http.Response, error) {
					require.Equal(t, "POST http://sfu.test/twirp/livekit.RoomService/"+method, r.Method+" "+r.URL.String())
					require.Equal(t, "application/json", r.Header.Get("Content-Type"))
					body, err := io.ReadAll(r.Body)
					require.NoError(t, err)
					require.JSONEq(t, test.request, string(body))
					token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
					require.True(t, ok)
					require.JSONEq(t, `{"iss": "matrix", "nbf": 946684800, "exp": 946684860, "video": `+test.grants+`}`, claimsOf(t, token))
					return answer.RoundTrip(r)
				})
				result, err := test.call(t.Context(), c)
				require.NoError(t, err)
				require.Equal(t, test.result, result)
			})
		})
	}
}

// Only LiveKit's own answers say that something is not there, or that the key is wrong. No error has the token, even if the answer has.
func TestFailures(t *testing.T) {
	for name, test := range map[string]struct {
		status int
		body   string
		want   error
	}{
		"not there":             {http.StatusNotFound, `{"code": "not_found", "msg": "participant does not exist"}`, ErrNotFound},
		"wrong secret":          {http.StatusUnauthorized, `invalid token: TOKEN, error: signature is invalid`, ErrRefused},
		"wrong key":             {http.StatusUnauthorized, `invalid API key: matrix`, ErrRefused},
		"no permission":         {http.StatusForbidden, `{"code": "permission_denied", "msg": "TOKEN"}`, ErrRefused},
		"a proxy's 404":         {http.StatusNotFound, `<html>404 Not Found`, nil},
		"a homeserver's 404":    {http.StatusNotFound, `{"errcode": "M_UNRECOGNIZED"}`, nil},
		"a method that is gone": {http.StatusNotFound, `{"code": "bad_route", "msg": "no handler for path"}`, nil},
		"a proxy's 502":         {http.StatusBadGateway, `<html>502 Bad Gateway TOKEN`, nil},
		"LiveKit is overloaded": {http.StatusServiceUnavailable, `{"code": "unavailable", "msg": "TOKEN"}`, nil},
		"a redirection":         {http.StatusTemporaryRedirect, ``, nil},
		"a page":                {http.StatusOK, `<html>Welcome TOKEN`, nil},
		"half an answer":        {http.StatusOK, `{"rooms": [], "participants": [], "identi`, nil},
		"an answer without end": {http.StatusOK, `{"rooms": [], "participants": [], "more": "` + strings.Repeat("x", maxAnswer) + `"}`, nil},
		"nothing":               {http.StatusOK, ``, nil},
	} {
		t.Run(name, func(t *testing.T) {
			for method, call := range calls {
				c := answering(test.status, test.body, "Location", "http://elsewhere.test/")
				requests, token, answer := 0, "", c.http.Transport
				c.http.Transport = sfu(func(r *http.Request) (*http.Response, error) {
					if requests++; requests > 1 {
						return nil, errors.New("one too many")
					}
					token = strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
					return answer.RoundTrip(r)
				})
				_, err := call.call(t.Context(), c)
				require.Error(t, err, method)
				require.Equal(t, 1, requests, "nothing is repeated, or sent elsewhere")
				require.Equal(t, test.want == ErrNotFound, errors.Is(err, ErrNotFound), "%s: %v", method, err)
				require.Equal(t, test.want == ErrRefused, errors.Is(err, ErrRefused), "%s: %v", method, err)
				require.NotContains(t, err.Error(), token)
			}
		})
	}
}

// A success that is not about what was asked is none, least of all a list without anybody.
func TestOtherSuccesses(t *testing.T) {
	for _, body := range []string{
		`{}`, `{"rooms": null, "participants": null}`, `{"name": "a room"}`,
		`{"name": "another", "sid": "RM_2", "identity": "another", "rooms": [{"name": "another", "sid": "RM_2"}]}`,
	} {
		for method, call := range calls {
			if method == "RemoveParticipant" { // its success has nothing in it
				continue
			}
			_, err := call.call(t.Context(), answering(http.StatusOK, body))
			require.Error(t, err, "%s: %s", method, body)
			require.NotErrorIs(t, err, ErrNotFound, "%s: %s", method, body)
		}
	}
}

// A room that is not in LiveKit's list is not there. A participant of a room that is not there is not in its list.
func TestEmptyLists(t *testing.T) {
	c := answering(http.StatusOK, `{"rooms": [], "participants": []}`)
	_, err := c.Room(t.Context(), "a room")
	require.ErrorIs(t, err, ErrNotFound)
	sessions, err := c.Participants(t.Context(), "a room")
	require.NoError(t, err)
	require.Empty(t, sessions)
}

// A LiveKit that does not answer ends neither the caller nor the participants.
func TestLiveKitIsAway(t *testing.T) {
	for method, call := range calls {
		synctest.Test(t, func(t *testing.T) {
			c := newClient()
			c.http.Transport = sfu(func(r *http.Request) (*http.Response, error) {
				<-r.Context().Done()
				return nil, r.Context().Err()
			})
			began := time.Now()
			_, err := call.call(t.Context(), c)
			require.ErrorIs(t, err, context.DeadlineExceeded, method)
			require.Equal(t, callTimeout, time.Since(began), method)
			require.NotErrorIs(t, err, ErrNotFound, method)
			require.NotErrorIs(t, err, ErrRefused, method)

			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, err = call.call(ctx, c)
			require.ErrorIs(t, err, context.Canceled, method)
		})
	}
}

// Check reports how far the clocks are apart, also if this is why LiveKit refuses. A second is not exact, and no reason to report.
func TestSkew(t *testing.T) {
	for name, test := range map[string]struct {
		date  string
		takes time.Duration
		want  time.Duration
	}{
		"the same":             {date: "Sat, 01 Jan 2000 00:00:00 GMT"},
		"LiveKit is ahead":     {date: "Sat, 01 Jan 2000 00:01:30 GMT", want: 90 * time.Second},
		"LiveKit is behind":    {date: "Fri, 31 Dec 1999 23:58:29 GMT", want: -90 * time.Second},
		"the second before":    {date: "Fri, 31 Dec 1999 23:59:59 GMT"},
		"a slow answer":        {date: "Sat, 01 Jan 2000 00:00:03 GMT", takes: 4 * time.Second},
		"ahead, and slow":      {date: "Sat, 01 Jan 2000 00:00:13 GMT", takes: 3 * time.Second, want: 10 * time.Second},
		"no date":              {},
		"a date that is wrong": {date: "yesterday"},
	} {
		t.Run(name, func(t *testing.T) {
			for status, body := range map[int]string{http.StatusOK: `{"rooms": []}`, http.StatusUnauthorized: "invalid token"} {
				synctest.Test(t, func(t *testing.T) { // it is 2000-01-01 00:00:00 UTC
					c := answering(status, body, "Date", test.date)
					answer := c.http.Transport
					c.http.Transport = sfu(func(r *http.Request) (*http.Response, error) {
						time.Sleep(test.takes)
						return answer.RoundTrip(r)
					})
					skew, err := c.Check(t.Context())
					require.Equal(t, status == http.StatusUnauthorized, errors.Is(err, ErrRefused))
					require.Equal(t, status == http.StatusOK, err == nil)
					require.Equal(t, test.want, skew)
				})
			}
		})
	}
}
