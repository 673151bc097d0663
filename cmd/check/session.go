package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/gjson"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/synapseadmin"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// requestTime limits one request, and awaitTime the wait for an expected event.
	requestTime = 15 * time.Second
	awaitTime   = 15 * time.Second
	// pollTime is the timeout of one sync.
	pollTime = 2 * time.Second
	// patience limits how long a rate-limited request is repeated.
	patience = 20 * time.Second
)

// origin is the origin that a browser would send for the page.
const origin = "https://call.example.com"

// credentials are the ways into an account. All of them may be empty.
type credentials struct {
	user, password, token, secret string
}

// session is the state that the checks of one server share.
type session struct {
	who  credentials
	http *http.Client
	// server is the server named on the command line, and base is the URL of its client API.
	server, base string
	versions     gjson.Result
	wellKnown    gjson.Result
	// user is nil until there is an account. roomID and the fields after it are empty until there is a room.
	user      *homeserver.Client
	noAccount unknownError // why there is no account, if that is not the server's fault
	deviceID  string
	roomID    string
	since     string       // of the last sync
	leaveID   string       // the delay ID of the delayed leave event
	transport gjson.Result // of LiveKit
	openID    gjson.Result
	sfu       gjson.Result // LiveKit's URL, and a token for it
	// takesLeaves is true if the service seems to take leave events.
	takesLeaves bool
	// asked are the requests that a browser would have to be allowed.
	asked []exchange
	// tidy are the steps that undo what the checks created, run in reverse order.
	tidy []undo
}

type undo struct {
	what string
	do   func(context.Context) error
}

// exchange is a request, and the parts of its answer that a browser checks.
type exchange struct {
	base, method, path string
	authed, body, ok   bool
	allowOrigin        string
}

func newSession(server string, who credentials) *session {
	server = strings.TrimSuffix(server, "/")
	return &session{who: who, server: server, base: server, http: &http.Client{Timeout: requestTime}}
}

// anybody is a client without an account.
func (s *session) anybody() *homeserver.Client { return &homeserver.Client{URL: s.base, HTTP: s.http} }

// ask sends a request as a browser would, and fails unless the answer is 200. It repeats a rate-limited request.
func (s *session) ask(ctx context.Context, c *homeserver.Client, method, path string, body any) (homeserver.Response, error) {
	for began := time.Now(); ; {
		res, err := c.Do(ctx, method, path, body, "Origin", origin)
		if err != nil {
			return res, plain(err)
		}
		if wait := time.Duration(res.Get("retry_after_ms").Int()) * time.Millisecond; res.Code == http.StatusTooManyRequests &&
			wait > 0 && time.Since(began)+wait < patience {
			select {
			case <-time.After(wait):
				continue
			case <-ctx.Done():
				return res, ctx.Err()
			}
		}
		route, _, _ := strings.Cut(path, "?")
		s.asked = append(s.asked, exchange{
			c.URL, method, route, c.Token != "", body != nil, res.Code == http.StatusOK, res.Header.Get("Access-Control-Allow-Origin"),
		})
		if res.Code != http.StatusOK {
			return res, errors.New(said(res))
		}
		return res, nil
	}
}

// plain removes method and URL from an error of net/http, because they contain secrets and make the line long.
func plain(err error) error {
	if failed := (*url.Error)(nil); errors.As(err, &failed) {
		return failed.Err
	}
	return err
}

// said describes the answer of a server that did not do what the request asked for.
func said(res homeserver.Response) string {
	text := fmt.Sprintf("HTTP %d", res.Code)
	if errcode := res.Get("errcode").Str; errcode != "" {
		text += " " + errcode
	}
	if message := res.Get("error").Str; message != "" {
		text += fmt.Sprintf(" (%.80s)", message)
	}
	return text
}

// enter obtains an account, and returns its user ID.
func (s *session) enter(ctx context.Context) (string, error) {
	var (
		account = s.anybody()
		err     error
	)
	switch {
	case s.who.token != "":
		account.Token = s.who.token
	case s.who.user != "":
		err = s.logIn(ctx, account)
	default:
		err = s.register(ctx, account)
	}
	if err != nil {
		return "", err
	}
	res, err := s.ask(ctx, account, http.MethodGet, "/_matrix/client/v3/account/whoami", nil)
	if err != nil {
		return "", err
	}
	account.UserID, s.deviceID = res.Get("user_id").Str, res.Get("device_id").Str
	s.user = account
	return account.UserID, nil
}

func (s *session) logIn(ctx context.Context, account *homeserver.Client) error {
	res, err := s.ask(ctx, account, http.MethodPost, "/_matrix/client/v3/login", homeserver.JSON{
		"type": "m.login.password", "identifier": homeserver.JSON{"type": "m.id.user", "user": s.who.user},
		"password": s.who.password, "initial_device_display_name": "check for Element Call",
	})
	if err != nil {
		return err
	}
	account.Token = res.Get("access_token").Str
	s.undo("the login", func(ctx context.Context) error {
		_, err := s.ask(ctx, account, http.MethodPost, "/_matrix/client/v3/logout", homeserver.JSON{})
		return err
	})
	return nil
}

// register makes an account with a random password.
func (s *session) register(ctx context.Context, account *homeserver.Client) error {
	name, password := "check-"+strings.ToLower(rand.Text()[:12]), rand.Text()
	if s.who.secret != "" {
		// The request goes to the given server, not to where the well-known file leads: a proxy should not let clients reach this API.
		admin, err := mautrix.NewClient(s.server, "", "")
		if err != nil {
			return err
		}
		admin.Client = s.http
		made, err := (&synapseadmin.Client{Client: admin}).SharedSecretRegister(ctx, s.who.secret,
			synapseadmin.ReqSharedSecretRegister{Username: name, Password: password})
		if err != nil {
			return fmt.Errorf("registering with the secret: %w", plain(err))
		}
		account.Token = made.AccessToken
	} else {
		res, err := account.Do(ctx, http.MethodPost, "/_matrix/client/v3/register",
			homeserver.JSON{"username": name, "password": password, "auth": homeserver.JSON{"type": "m.login.dummy"}})
		switch {
		case err != nil:
			return plain(err)
		case res.Code != http.StatusOK:
			return unknownError("there is no account, and nobody may register: " + said(res) +
				"\n         -> Name one with --user and --password or --token, or let one be made with --registration-secret.")
		}
		account.Token = res.Get("access_token").Str
	}
	s.undo("the account "+name, func(ctx context.Context) error {
		_, err := s.ask(ctx, account, http.MethodPost, "/_matrix/client/v3/account/deactivate", homeserver.JSON{"auth": homeserver.JSON{
			"type": "m.login.password", "identifier": homeserver.JSON{"type": "m.id.user", "user": account.UserID}, "password": password,
		}})
		return err
	})
	return nil
}

// undo remembers a step that undoes a change.
func (s *session) undo(what string, do func(context.Context) error) {
	s.tidy = append(s.tidy, undo{what, do})
}

// tidyUp undoes the changes, and returns those that it could not undo.
func (s *session) tidyUp(ctx context.Context) (left []string) {
	for _, step := range slices.Backward(s.tidy) {
		if err := step.do(ctx); err != nil {
			left = append(left, fmt.Sprintf("%s: %v", step.what, err))
		}
	}
	return left
}

// sync makes one sync request. The server waits up to timeout for news.
func (s *session) sync(ctx context.Context, timeout time.Duration) (homeserver.Response, error) {
	query := url.Values{
		"timeout": {fmt.Sprint(timeout.Milliseconds())}, "set_presence": {"offline"}, "org.matrix.msc4222.use_state_after": {"true"},
	}
	if s.since != "" {
		query.Set("since", s.since)
	}
	res, err := s.ask(ctx, s.user, http.MethodGet, "/_matrix/client/v3/sync?"+query.Encode(), nil)
	if err == nil {
		s.since = res.Get("next_batch").Str
	}
	return res, err
}

// await syncs until come reports that the expected event has arrived.
func (s *session) await(ctx context.Context, come func(homeserver.Response) bool) error {
	for deadline := time.Now().Add(awaitTime); time.Now().Before(deadline); {
		res, err := s.sync(ctx, pollTime)
		if err != nil {
			return err
		}
		if come(res) {
			return nil
		}
	}
	return fmt.Errorf("nothing came within %v", awaitTime)
}

// inRoom returns a part of the room's section in a sync response.
func (s *session) inRoom(res homeserver.Response, part string) gjson.Result {
	return res.Get("rooms.join").Get(gjson.Escape(s.roomID)).Get(part)
}

// awaitMember syncs until the call's membership event arrives with this content.
func (s *session) awaitMember(ctx context.Context, content string) error {
	return s.await(ctx, func(res homeserver.Response) (come bool) {
		for _, event := range s.inRoom(res, "timeline.events").Array() {
			come = come || event.Get("type").Str == memberType && event.Get("content").Raw == content
		}
		return come
	})
}

// memberType and memberPath are the membership of a call, as matrix-js-sdk calls it.
const memberType = "org.matrix.msc3401.call.member"

func (s *session) memberPath() string {
	return homeserver.StatePath(s.roomID, memberType, fmt.Sprintf("_%s_%s_m.call", s.user.UserID, s.deviceID))
}

// setMember sends the call's membership event.
func (s *session) setMember(ctx context.Context, content string) error {
	_, err := s.ask(ctx, s.user, http.MethodPut, s.memberPath(), json.RawMessage(content))
	return err
}
