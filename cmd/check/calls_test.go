package main

import (
	"cmp"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/fakelivekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// withLiveKit is the configuration of a homeserver that makes the tokens for a LiveKit itself. Clients reach LiveKit at this URL with http.
func withLiveKit(liveKit *fakelivekit.Server, url string) homeserver.Config {
	section := liveKit.Section("ws" + strings.TrimPrefix(url, "http"))
	return homeserver.Config{WellKnown: true, MatrixRTC: homeserver.JSON{"livekit": section}}
}

// withService is the configuration of a homeserver for whose calls a service gives out tokens.
func withService(t *testing.T, s *service) homeserver.Config {
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return homeserver.Config{WellKnown: true, MatrixRTC: homeserver.JSON{"transports": []homeserver.JSON{
		{"type": "livekit", "livekit_service_url": server.URL + "/jwt"},
	}}}
}

// service gives out tokens as lk-jwt-service does.
type service struct {
	liveKit *fakelivekit.Server
	secret  livekit.Secret // with which it signs; by default LiveKit's
	takes   bool           // it says that it takes leave events
	refuses bool           // it does not
}

func (s *service) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.Header().Set("Access-Control-Allow-Headers", "Content-Type")
	w.Header().Set("Access-Control-Allow-Methods", "POST")
	var asked struct {
		Room    string `json:"room"`
		Device  string `json:"device_id"`
		DelayID string `json:"delay_id"`
		OpenID  struct {
			AccessToken string `json:"access_token"`
		} `json:"openid_token"`
	}
	switch {
	case req.Method == http.MethodOptions:
	case req.URL.Path == "/jwt/delegate_delayed_leave" && s.takes:
		w.WriteHeader(http.StatusBadRequest)
	case req.URL.Path != "/jwt/sfu/get":
		w.WriteHeader(http.StatusNotFound)
	case json.NewDecoder(req.Body).Decode(&asked) != nil, asked.OpenID.AccessToken == "", asked.DelayID != "" && (s.refuses || !s.takes):
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"errcode": "M_BAD_JSON"}`)
	default:
		cfg := livekit.Config{APIURL: s.liveKit.URL, Key: fakelivekit.Key, Secret: fakelivekit.Secret}
		p := livekit.Participant{Room: livekit.RoomName(asked.Room, "m.call#ROOM"), Identity: asked.Device}
		if _, err := livekit.New(cfg).CreateRoom(req.Context(), p.Room); err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		if s.secret != "" {
			cfg.Secret = s.secret
		}
		token, _ := livekit.New(cfg).Token(livekit.Grant{Participant: p, Publish: true})
		_ = json.NewEncoder(w).Encode(map[string]string{"url": "ws" + strings.TrimPrefix(s.liveKit.URL, "http"), "jwt": token})
	}
}

const (
	serviceAnswers = "LiveKit service"
	homeSees       = "LiveKit: as the homeserver sees it"
	urlsSecure     = "LiveKit: URLs that browsers may call"
	tokenTaken     = "LiveKit: takes the token"
	leavesTaken    = "delayed leave: taken by the service"
	promiseKept    = "delayed leave: promised only if taken"
	leaveSent      = "delayed leave: sent after it is handed over"
	homeToken      = "LiveKit: tokens from the homeserver itself"
)

// Each way in which a client does not get to LiveKit has its own words, without the token.
func TestLiveKit(t *testing.T) {
	liveKit := fakelivekit.Start()
	t.Cleanup(liveKit.Close)
	target, err := url.Parse(liveKit.URL)
	require.NoError(t, err)
	client := livekit.New(livekit.Config{APIURL: liveKit.URL, Key: fakelivekit.Key, Secret: fakelivekit.Secret})
	_, err = client.CreateRoom(t.Context(), "room")
	require.NoError(t, err)
	for name, test := range map[string]struct {
		room   string                          // of the token; by default the one that is there
		secret livekit.Secret                  // of the token; by default LiveKit's
		proxy  func(http.Handler) http.Handler // in front of LiveKit; nil is none
		want   string
	}{
		"Works":       {},
		"Unreachable": {want: "LiveKit cannot be reached: dial tcp"},
		"OtherSecret": {secret: "another one", want: "HTTP 401: LiveKit refuses the token"},
		"OtherPath":   {proxy: answering(http.StatusNotFound), want: "HTTP 404: there is no LiveKit at this path"},
		"OtherRooms":  {room: "another", want: "HTTP 404: LiveKit takes the token, and has no room for it"},
		"BadGateway":  {proxy: answering(http.StatusBadGateway), want: "HTTP 502: the proxy does not reach LiveKit"},
		"Page":        {proxy: answering(http.StatusOK), want: "HTTP 200: something else than LiveKit"},
		"Redirect":    {proxy: answering(http.StatusMovedPermanently), want: "HTTP 301: a redirect"},
		"Fault":       {proxy: answering(http.StatusInternalServerError), want: "HTTP 500: LiveKit does not take the token"},
		"NoWebSockets": {proxy: func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				req.Header.Del("Upgrade")
				next.ServeHTTP(w, req)
			})
		}, want: "a WebSocket does not get through to LiveKit: HTTP 404"},
	} {
		t.Run(name, func(t *testing.T) {
			var handler http.Handler = httputil.NewSingleHostReverseProxy(target)
			if test.proxy != nil {
				handler = test.proxy(handler)
			}
			front := httptest.NewServer(handler)
			defer front.Close()
			if name == "Unreachable" {
				front.Close()
			}
			signer := livekit.New(livekit.Config{Key: fakelivekit.Key, Secret: cmp.Or(test.secret, fakelivekit.Secret)})
			token, err := signer.Token(livekit.Grant{Participant: livekit.Participant{Room: cmp.Or(test.room, "room"), Identity: "alice"}})
			require.NoError(t, err)
			s := newSession("http://unused.invalid", credentials{})
			s.sfu = gjson.Parse(`{"url": "ws` + strings.TrimPrefix(front.URL, "http") + `/", "jwt": "` + token + `"}`)
			seen, err := tryLiveKit(t.Context(), s)
			if test.want == "" {
				require.NoError(t, err)
				require.Equal(t, front.URL, seen)
				return
			}
			require.ErrorContains(t, err, test.want)
			require.NotContains(t, err.Error(), token)
		})
	}
}

// answering is a proxy that answers each request itself, with a code and, as LiveKit does, with the token in the body.
func answering(code int) func(http.Handler) http.Handler {
	return func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Location", "/elsewhere?"+req.URL.RawQuery)
			w.WriteHeader(code)
			_, _ = io.WriteString(w, "<html>"+req.FormValue("access_token"))
		})
	}
}

// A browser calls plain URLs from a page of a secure site only on its own machine.
func TestIsSecure(t *testing.T) {
	for text, secure := range map[string]bool{
		"https://rtc.example.com/jwt": true, "wss://rtc.example.com": true,
		"http://localhost:8080/jwt": true, "ws://127.0.0.1:7880": true, "ws://127.0.0.53": true, "ws://[::1]:7880/": true,
		"http://rtc.example.com/jwt": false, "ws://rtc.example.com": false, "ws://192.168.1.2:7880": false, "ws://localhost.example.com": false,
		"ws://0.0.0.0:7880": false, "rtc.example.com": false, "127.0.0.1:7880": false, "wss://%": false,
	} {
		require.Equal(t, secure, isSecure(text), text)
	}
}

// The trap: one of two promises is enough for Element Call, and only the service can keep it.
func TestPromise(t *testing.T) {
	const none, all = http.StatusNotFound, "*"
	for name, test := range map[string]struct {
		home, service int // the answers; 0 is none
		allowed       string
		takes, trap   bool
	}{
		"Nobody":       {none, none, all, false, false},
		"Service":      {none, http.StatusUnauthorized, all, true, false},
		"Both":         {http.StatusUnauthorized, http.StatusBadRequest, all, true, false},
		"Trap":         {http.StatusMethodNotAllowed, none, all, false, true},
		"TrapNoAnswer": {http.StatusOK, 0, all, false, true},
		"NoHeaders":    {http.StatusUnauthorized, http.StatusUnauthorized, "", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				code := none
				switch req.URL.Path {
				case homeRTC + delegatePath:
					code = test.home
				case "/jwt" + delegatePath:
					code = test.service
				}
				if code == 0 {
					panic(http.ErrAbortHandler)
				}
				if test.allowed != "" {
					w.Header().Set("Access-Control-Allow-Origin", test.allowed)
				}
				w.WriteHeader(code)
			}))
			defer server.Close()
			s := newSession(server.URL, credentials{})
			s.transport = gjson.Parse(`{"livekit_service_url": "` + server.URL + `/jwt/"}`)
			_, err := tryTakes(t.Context(), s)
			require.Equal(t, test.takes, err == nil)
			_, err = tryPromise(t.Context(), s)
			require.Equal(t, test.trap, err != nil)
		})
	}
}

// The homeserver must make tokens itself if a transport has a url.
func TestHomeToken(t *testing.T) {
	for name, test := range map[string]struct {
		transport, answer, stableAnswer string // "" is 404
		seen, want                      string
	}{
		"Announced":   {`{"url": "wss://a.example"}`, `{"jwt": "a.b.c"}`, `{"jwt": "a.b.c"}`, "", ""},
		"Unstable":    {`{"url": "wss://a.example"}`, `{"jwt": "a.b.c"}`, "", "only on the unstable path", ""},
		"NotThere":    {`{"url": "wss://a.example"}`, "", `{"jwt": "a.b.c"}`, "", "HTTP 404"},
		"NoToken":     {`{"url": "wss://a.example"}`, "{}", "{}", "", "the answer has no token"},
		"Unannounced": {"{}", `{"jwt": "a.b.c"}`, `{"jwt": "a.b.c"}`, "", ""},
		"NotNeeded":   {"{}", "", "", "not needed: the transports have no url", ""},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				body, _ := io.ReadAll(req.Body)
				answer := map[string]string{homeRTC + "/get_token": test.answer, homeRTCStable + "/get_token": test.stableAnswer}[req.URL.Path]
				if answer == "" || gjson.GetBytes(body, "url").Str != "wss://a.example" {
					w.WriteHeader(http.StatusNotFound)
				}
				_, _ = io.WriteString(w, answer)
			}))
			defer server.Close()
			s := newSession(server.URL, credentials{})
			s.user, s.transport, s.sfu = s.anybody(), gjson.Parse(test.transport), gjson.Parse(`{"url": "wss://a.example"}`)
			seen, err := tryHomeToken(t.Context(), s)
			if test.want != "" {
				require.ErrorContains(t, err, test.want)
				return
			}
			require.NoError(t, err)
			require.Equal(t, test.seen, seen)
		})
	}
}

// The command names what is wrong with the call backend, whoever makes the tokens, and reports nothing else.
func TestCalls(t *testing.T) {
	liveKit, away := fakelivekit.Start(), fakelivekit.Start()
	t.Cleanup(liveKit.Close)
	t.Cleanup(away.Close)
	away.SetAway(true)
	wrongSecret := withLiveKit(liveKit, liveKit.URL)
	wrongSecret.MatrixRTC["livekit"].(homeserver.JSON)["api_secret"] = strings.Repeat("wrong", 10)
	for name, fault := range map[string]struct {
		cfg homeserver.Config
		// path is the end of the paths that the homeserver's proxy answers itself, with this code.
		path                      string
		code                      int
		MISSING, missing, unknown []string
		says                      string
	}{
		// Tokens of this server.
		"WrongSecret": {
			cfg:     wrongSecret,
			MISSING: []string{serviceAnswers}, missing: []string{homeSees}, unknown: []string{tokenTaken, leaveSent, homeToken},
			says: "calls: LiveKit refuses the key or the secret",
		},
		"Away": {
			cfg:     withLiveKit(away, away.URL),
			MISSING: []string{serviceAnswers}, missing: []string{homeSees}, unknown: []string{tokenTaken, leaveSent, homeToken},
			says: "calls: LiveKit cannot be reached",
		},
		"WrongPath": {cfg: withLiveKit(liveKit, liveKit.URL+"/livekit/sfu"), MISSING: []string{tokenTaken}, says: "HTTP 404: there is no LiveKit"},
		// The address is the machine itself for connections, and not for browsers.
		"NoTLS": {
			cfg:     withLiveKit(liveKit, strings.Replace(liveKit.URL, "127.0.0.1", "0.0.0.0", 1)),
			MISSING: []string{urlsSecure}, missing: []string{homeSees}, says: "cannot call ws://0.0.0.0:",
		},
		// Tokens of another service.
		"TwoSecrets": {
			cfg:     withService(t, &service{liveKit: liveKit, takes: true, secret: "another one"}),
			MISSING: []string{tokenTaken}, says: "HTTP 401: LiveKit refuses the token",
		},
		"NoLeaves": {cfg: withService(t, &service{liveKit: liveKit}), missing: []string{leavesTaken}, says: "by nobody"},
		"Trap": {
			cfg: withService(t, &service{liveKit: liveKit}), path: delegatePath, code: http.StatusUnauthorized,
			MISSING: []string{promiseKept}, missing: []string{leavesTaken}, says: "the service takes none",
		},
		"LeavesRefused": {
			cfg:     withService(t, &service{liveKit: liveKit, takes: true, refuses: true}),
			MISSING: []string{leaveSent}, says: "HTTP 400 M_BAD_JSON",
		},
	} {
		t.Run(name, func(t *testing.T) {
			hs := start(t, ours, fault.cfg)
			server, missing := hs.URL, fault.missing
			if fault.path != "" {
				// The well-known file would bypass the proxy.
				missing = append([]string{"well-known: where the server is", "well-known: where calls go"}, missing...)
				server = startProxy(t, hs, func(req *http.Request) int {
					switch {
					case strings.HasPrefix(req.URL.Path, "/.well-known/"):
						return http.StatusNotFound
					case strings.HasSuffix(req.URL.Path, fault.path):
						return fault.code
					}
					return 0
				}, nil).URL
			}
			code, printed, found := checked(t, nil, "--server", server)
			require.Equal(t, fault.MISSING, found["MISSING"], printed)
			require.Equal(t, missing, found["missing"], printed)
			require.Equal(t, fault.unknown, found["unknown"], printed)
			require.Equal(t, fault.MISSING != nil, code == exitMissing, printed)
			require.Contains(t, printed, fault.says)
			require.NotContains(t, printed, "eyJ", "a token for LiveKit")
		})
	}
}
