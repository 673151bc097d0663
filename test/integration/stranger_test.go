//go:build all

package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// stranger is a connection on which the test writes HTTP by hand.
type stranger struct {
	net.Conn
	in *bufio.Reader
}

// stranger opens a connection. Loopback has many addresses, and each number gets an address of its own.
func (s *server) stranger(ctx context.Context, number int) (*stranger, error) {
	dialer := net.Dialer{
		Timeout:   soon,
		LocalAddr: &net.TCPAddr{IP: net.IPv4(127, byte(1+number>>16), byte(number>>8), byte(number))},
	}
	conn, err := dialer.DialContext(ctx, "tcp", strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		return nil, err
	}
	return &stranger{conn, bufio.NewReader(conn)}, nil
}

// code reads an answer and returns its status and error code.
func (s *stranger) code() (int, string, error) {
	res, err := http.ReadResponse(s.in, nil)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	var body struct {
		ErrCode string `json:"errcode"`
	}
	if err = json.NewDecoder(res.Body).Decode(&body); err != nil && !errors.Is(err, io.EOF) {
		return 0, "", err
	}
	_, err = io.Copy(io.Discard, res.Body)
	return res.StatusCode, body.ErrCode, err
}

// awaitHangUp reads until the server closes the connection. It returns the status line of the answer, or "".
func (s *stranger) awaitHangUp() (string, error) {
	if err := s.SetReadDeadline(time.Now().Add(hangUp)); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(s.in)
	status, _, _ := strings.Cut(string(answer), "\r\n")
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
		return status, errors.New("the server does not hang up")
	}
	return status, nil // the server has sent an answer or reset the connection
}

// trickle writes a byte from time to time, until the server closes the connection.
func (s *stranger) trickle(ctx context.Context, data string) {
	pause := time.NewTicker(300 * time.Millisecond)
	defer pause.Stop()
	for {
		for i := range len(data) {
			if _, err := io.WriteString(s, data[i:i+1]); err != nil {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-pause.C:
			}
		}
	}
}
