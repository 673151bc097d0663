package rtc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/sirupsen/logrus"
	"github.com/tidwall/gjson"
)

const (
	// remoteTimeout is how long other servers may take in total for one request.
	remoteTimeout = 10 * time.Second
	// maxPublishers is how many servers are asked, one after the other, whether a URL is that of their SFU.
	maxPublishers = 3
	// crowdedPause is after what time to try again if too many requests of a user wait.
	crowdedPause = time.Second
)

// HTTP sends requests to other servers. The host of a request's URL is the server's name, and the scheme is matrix. See *fclient.Client.
type HTTP interface {
	DoHTTPRequest(ctx context.Context, req *http.Request) (*http.Response, error)
}

// ofPublisher returns a token for an SFU that is not ours, and whose server the client does not name. The server is that of a member of the
// room's calls who publishes to the SFU. Any member can claim that, so several servers are asked.
func (t *Tokens) ofPublisher(ctx context.Context, m member, sfu string) (jwt string, err error) {
	servers, err := t.parts.Rooms.Publishers(ctx, m.roomID, trimmed(sfu))
	if err != nil {
		return "", err
	}
	err = errNotOurs
	ctx, cancel := context.WithTimeout(ctx, remoteTimeout)
	defer cancel()
	asked := 0
	for _, server := range servers {
		if t.dendrite.IsLocalServerName(server) || asked == maxPublishers {
			continue
		}
		asked++
		ctx, cancel := context.WithTimeout(ctx, remoteTimeout/time.Duration(min(maxPublishers, len(servers))))
		jwt, err = t.ofServer(ctx, m, sfu, server)
		cancel()
		if err == nil {
			return jwt, nil
		}
	}
	return "", err
}

// ofServer returns a token that another server makes for our user. The server must be in the room, so that this server asks no strangers.
func (t *Tokens) ofServer(ctx context.Context, m member, sfu string, server spec.ServerName) (string, error) {
	joined, err := t.parts.Rooms.ServerJoined(ctx, m.roomID, server)
	switch {
	case err != nil:
		return "", err
	case !joined:
		return "", errServerNotJoined
	}
	ctx, cancel := context.WithTimeout(ctx, remoteTimeout)
	defer cancel()
	for _, path := range tokenPaths {
		status, answer, err := t.askServer(ctx, server, path+"/get_token", m, sfu)
		jwt, code := answer.Get("jwt"), spec.MatrixErrorCode(answer.Get("errcode").Str)
		switch {
		case err != nil:
			util.GetLogger(ctx).WithError(err).WithField("server", server).Info("Failed to get a token of another server's LiveKit")
			return "", errOtherServer
		case code == spec.ErrorUnrecognized: // it may know the other path
			continue
		case status == http.StatusOK && jwt.Type == gjson.String && jwt.Str != "":
			return jwt.Str, nil
		}
		return "", handedOn(status, code, answer.Get("error").Str)
	}
	return "", errOtherServer
}

// askServer sends a request for a token to another server. The member has the same form in it as in the client's request, because the form
// decides about the identity.
func (t *Tokens) askServer(ctx context.Context, server spec.ServerName, path string, m member, sfu string) (status int, answer gjson.Result, err error) {
	content := map[string]any{"url": sfu, "room_id": m.roomID, "slot_id": m.slotID, "user_id": m.userID}
	if m.deviceID == "" {
		content["member_id"] = m.id
	} else {
		content["member"] = map[string]string{"id": m.id, "claimed_device_id": m.deviceID}
	}
	user, err := spec.NewUserID(m.userID, true)
	if err != nil {
		return 0, answer, err
	}
	identity, err := t.dendrite.SigningIdentityFor(user.Domain())
	if err != nil {
		return 0, answer, err
	}
	signed := fclient.NewFederationRequest(http.MethodPost, identity.ServerName, server, "/_matrix/federation"+path)
	err = errors.Join(signed.SetContent(content), signed.Sign(identity.ServerName, identity.KeyID, identity.PrivateKey))
	if err != nil {
		return 0, answer, fmt.Errorf("signing a request: %w", err)
	}
	req, err := signed.HTTPRequest()
	if err != nil {
		return 0, answer, fmt.Errorf("making a request: %w", err)
	}
	return fetch(ctx, t.others.Client, req)
}

// silent is the logger for requests to other servers. The library would log their URLs, which may have OpenID tokens.
var silent = &logrus.Entry{Logger: &logrus.Logger{Out: io.Discard, Level: logrus.PanicLevel}}

// fetch sends a request to another server, and returns its answer, which may be anything, but is no larger than maxBody. An answer that is
// not JSON has no fields.
func fetch(ctx context.Context, client HTTP, req *http.Request) (status int, answer gjson.Result, err error) {
	res, err := client.DoHTTPRequest(util.ContextWithLogger(ctx, silent), req)
	if err != nil {
		var withURL *url.Error
		if errors.As(err, &withURL) {
			err = withURL.Err
		}
		return 0, answer, fmt.Errorf("asking another server: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody)) // the part of a longer answer is no JSON
	if err != nil {
		return 0, answer, fmt.Errorf("reading the answer of another server: %w", err)
	}
	if gjson.ValidBytes(body) {
		answer = gjson.ParseBytes(body)
	}
	return res.StatusCode, answer, nil
}
