package rtc

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
)

// openIDToken is a token with which a user of any server shows who it is.
type openIDToken struct {
	token  string
	server spec.ServerName
}

// openID returns the OpenID token in a request. Its other fields do not matter.
func (f *fields) openID() openIDToken {
	return openIDToken{f.text("openid_token.access_token", maxSecret), spec.ServerName(f.name("openid_token.matrix_server_name"))}
}

// userOf returns the user whose OpenID token it is. The error is errOpenID if there is none. Tokens of this server are looked up here, so
// that this works without federation.
//
// Another server is asked only if it is in the room: otherwise everybody could make this server send requests to anywhere. Then the answer is
// the same as to a wrong token, so that it does not tell who is in the room.
func (s *service) userOf(ctx context.Context, openID openIDToken, roomID string) (*spec.UserID, error) {
	find := s.localUserOf
	if !s.dendrite.IsLocalServerName(openID.server) {
		joined, err := s.parts.Rooms.ServerJoined(ctx, roomID, openID.server)
		if err != nil {
			return nil, err
		}
		if !joined {
			return nil, errOpenID
		}
		find = s.remoteUserOf
	}
	userID, err := find(ctx, openID)
	if err != nil {
		return nil, err
	}
	user, err := spec.NewUserID(userID, true)
	if err != nil || user.Domain() != openID.server {
		return nil, errOpenID
	}
	return user, nil
}

func (s *service) localUserOf(ctx context.Context, openID openIDToken) (string, error) {
	var res userapi.QueryOpenIDTokenResponse
	err := s.userAPI.QueryOpenIDToken(ctx, &userapi.QueryOpenIDTokenRequest{Token: openID.token}, &res)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", errOpenID
	case err != nil:
		return "", fmt.Errorf("looking up an OpenID token: %w", err)
	case time.Now().UnixMilli() > res.ExpiresAtMS:
		return "", errOpenID
	}
	return res.Sub, nil
}

// remoteUserOf asks the server that has made the token. A server that does not answer is the same as a token that is not valid. The client
// of gomatrixserverlib has a method for this, which reads an answer of any size and logs the token.
func (s *service) remoteUserOf(ctx context.Context, openID openIDToken) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, remoteTimeout)
	defer cancel()
	from := url.URL{
		Scheme: "matrix", Host: string(openID.server), Path: "/_matrix/federation/v1/openid/userinfo",
		RawQuery: url.Values{"access_token": {openID.token}}.Encode(),
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from.String(), nil)
	if err != nil {
		return "", errOpenID
	}
	status, answer, err := fetch(ctx, s.others.Client, req)
	if err != nil {
		util.GetLogger(ctx).WithError(err).WithField("server", openID.server).Info("Failed to verify an OpenID token of another server")
	}
	if err != nil || status != http.StatusOK {
		return "", errOpenID
	}
	return answer.Get("sub").Str, nil
}
