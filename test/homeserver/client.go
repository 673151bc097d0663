package homeserver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"

	"github.com/tidwall/gjson"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/synapseadmin"
)

// Client is the access of one user to a server. Without a token it is anonymous.
type Client struct {
	URL    string
	UserID string
	Token  string
	// HTTP makes the requests; nil means a default client.
	HTTP *http.Client
}

// Response is the answer to a request.
type Response struct {
	Code   int
	Header http.Header
	Body   []byte
}

// Get returns a value from the answer's JSON, by a gjson path.
func (r Response) Get(path string) gjson.Result { return gjson.GetBytes(r.Body, path) }

func (r Response) String() string { return fmt.Sprintf("HTTP %d: %s", r.Code, r.Body) }

// Anonymous returns a client without an access token.
func (s *Server) Anonymous() *Client { return &Client{URL: s.URL} }

// Register makes an account and logs it in.
func (s *Server) Register(ctx context.Context, localpart string) (*Client, error) {
	return RegisterAt(ctx, s.URL, SharedSecret, localpart)
}

// RegisterAt makes an account with a server's registration secret, and logs it in.
func RegisterAt(ctx context.Context, serverURL, secret, localpart string) (*Client, error) {
	return register(ctx, serverURL, secret, localpart, false)
}

// RegisterAdmin makes the account of a server administrator.
func RegisterAdmin(ctx context.Context, serverURL, secret, localpart string) (*Client, error) {
	return register(ctx, serverURL, secret, localpart, true)
}

func register(ctx context.Context, serverURL, secret, localpart string, admin bool) (*Client, error) {
	client, err := mautrix.NewClient(serverURL, "", "")
	if err != nil {
		return nil, err
	}
	account, err := (&synapseadmin.Client{Client: client}).SharedSecretRegister(ctx, secret,
		synapseadmin.ReqSharedSecretRegister{Username: localpart, Password: Password, Admin: admin})
	if err != nil {
		return nil, fmt.Errorf("registering %s: %w", localpart, err)
	}
	return &Client{URL: serverURL, UserID: string(account.UserID), Token: account.AccessToken}, nil
}

// RegisterGuest makes a guest account.
func (s *Server) RegisterGuest(ctx context.Context) (*Client, error) {
	c := s.Anonymous()
	res, err := c.Do(ctx, http.MethodPost, "/_matrix/client/v3/register?kind=guest", map[string]any{})
	if err != nil {
		return nil, err
	}
	c.UserID, c.Token = res.Get("user_id").Str, res.Get("access_token").Str
	if c.Token == "" {
		return nil, fmt.Errorf("registering a guest: %s", res)
	}
	return c, nil
}

// Do sends a request. A body of type []byte or io.Reader is sent as it is, nil as no body, and anything else as JSON.
func (c *Client) Do(ctx context.Context, method, path string, body any, header ...string) (Response, error) {
	var reader io.Reader
	switch body := body.(type) {
	case nil:
	case []byte:
		reader = bytes.NewReader(body)
	case io.Reader:
		reader = body
	default:
		data, err := json.Marshal(body)
		if err != nil {
			return Response{}, err
		}
		reader = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.URL+path, reader)
	if err != nil {
		return Response{}, err
	}
	if c.Token != "" {
		req.Header.Set("Authorization", "Bearer "+c.Token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	client := c.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	res, err := client.Do(req)
	if err != nil {
		return Response{}, err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	return Response{Code: res.StatusCode, Header: res.Header, Body: data}, err
}

// JSON is a JSON object.
type JSON = map[string]any

// CreateRoom makes a room in which every member may send the events of calls. The fields of more are added to the request.
func (c *Client) CreateRoom(ctx context.Context, more JSON) (string, error) {
	body := JSON{
		"preset": "public_chat",
		"power_level_content_override": JSON{"events": JSON{
			"m.call.member": 0, "m.room.power_levels": 100, "m.room.history_visibility": 100,
		}},
	}
	for key, value := range more {
		body[key] = value
	}
	res, err := c.Do(ctx, http.MethodPost, "/_matrix/client/v3/createRoom", body)
	if err != nil {
		return "", err
	}
	roomID := res.Get("room_id").Str
	if roomID == "" {
		return "", fmt.Errorf("creating a room: %s", res)
	}
	return roomID, nil
}

// Join joins a room. The request names the server in the room's ID, because not every version of Dendrite reads it from there.
func (c *Client) Join(ctx context.Context, roomID string) error {
	_, server, _ := strings.Cut(roomID, ":")
	path := "/_matrix/client/v3/join/" + url.PathEscape(roomID) + "?server_name=" + url.QueryEscape(server)
	res, err := c.Do(ctx, http.MethodPost, path, JSON{})
	if err == nil && res.Code != http.StatusOK {
		err = errors.New(res.String())
	}
	return err
}

// StatePath returns the path of a piece of state.
func StatePath(roomID, eventType, stateKey string) string {
	return "/_matrix/client/v3/rooms/" + url.PathEscape(roomID) + "/state/" + url.PathEscape(eventType) + "/" + url.PathEscape(stateKey)
}

var lastTxn atomic.Int64

// SendPath returns a path with a new transaction ID for sending a message.
func SendPath(roomID, eventType string) string {
	return fmt.Sprintf("/_matrix/client/v3/rooms/%s/send/%s/txn%d",
		url.PathEscape(roomID), url.PathEscape(eventType), lastTxn.Add(1))
}

// KeepAlive calls the keep-alive endpoint, without an access token.
func (c *Client) KeepAlive(ctx context.Context, method, token string) (Response, error) {
	anonymous := &Client{URL: c.URL, HTTP: c.HTTP}
	return anonymous.Do(ctx, http.MethodPut, "/_matrix/client/v3/expiration/"+method, JSON{"expire_refresh_token": token})
}
