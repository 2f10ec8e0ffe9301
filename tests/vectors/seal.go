//go:build ignore

// Writes sealed.tsv with Go's crypto/cipher, as the backend seals: go run seal.go > sealed.tsv. seal.py writes the very same.
package main

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/hex"
	"fmt"
)

func counted(first, length int) []byte {
	bytes := make([]byte, length)
	for n := range bytes {
		bytes[n] = byte(first + n)
	}
	return bytes
}

func main() {
	current, previous, other := counted(0, 32), counted(100, 32), counted(200, 32)
	row, otherRow := counted(160, 16), counted(161, 16)
	cases := []struct {
		name           string
		key, row, text []byte
	}{
		{"current", current, nil, []byte("sk-sealed-under-the-current-key")},
		{"previous", previous, nil, []byte("sk-sealed-under-the-previous-key")},
		{"other", other, nil, []byte("sk-sealed-under-another-key")},
		{"empty", current, nil, nil},
		{"no-text", current, nil, []byte("\xff\xfe")},
		{"lines", current, nil, []byte("two lines\nand more")},
		{"long", current, nil, bytes.Repeat([]byte("k"), 4096)},
		{"row", current, row, []byte("sk-of-a-row")},
		{"row-previous", previous, row, []byte("sk-of-a-row-before")},
		{"other-row", current, otherRow, []byte("sk-of-another-row")},
	}
	for number, c := range cases {
		block, err := aes.NewCipher(c.key)
		if err != nil {
			panic(err)
		}
		gcm, err := cipher.NewGCM(block)
		if err != nil {
			panic(err)
		}
		nonce := counted(12*number, gcm.NonceSize())
		sealed := gcm.Seal(nonce, nonce, c.text, c.row)
		fmt.Printf("%s\t%s\t%s\t%s\t%s\n", c.name, base64.StdEncoding.EncodeToString(c.key), hex.EncodeToString(c.row),
			hex.EncodeToString(c.text), base64.StdEncoding.EncodeToString(sealed))
	}
}
